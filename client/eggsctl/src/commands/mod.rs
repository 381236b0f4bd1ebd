//! One file per command: what it takes (clap) and what it does.

pub mod cat;
pub mod chmod;
pub mod completions;
pub mod cp;
pub mod create_test_file;
pub mod df;
pub mod down;
pub mod fsck;
pub mod get;
pub mod ln;
pub mod ls;
pub mod man;
pub mod mkdir;
pub mod mv;
pub mod policy;
pub mod put;
pub mod readlink;
pub mod rm;
pub mod rmdir;
pub mod stat;
pub mod status;
pub mod touch;
pub mod txn;
pub mod up;
