//! One file per operation. Each checks everything first and writes last, so that a refusal changes
//! nothing (SH-11).

pub(crate) mod abandon_eden;
pub(crate) mod create_directory;
pub(crate) mod expire_eden;
pub(crate) mod extend_eden;
pub(crate) mod forget_transactions;
pub(crate) mod link_eden;
pub(crate) mod link_edge;
pub(crate) mod lock_dead_edge;
pub(crate) mod lock_directory;
pub(crate) mod lock_edge;
pub(crate) mod purge;
pub(crate) mod purge_directory;
pub(crate) mod purge_file;
pub(crate) mod put_small;
pub(crate) mod remove_directory;
pub(crate) mod rename;
pub(crate) mod replace_blocks;
pub(crate) mod revive_directory;
pub(crate) mod set_attributes;
pub(crate) mod set_owner;
pub(crate) mod set_policy;
pub(crate) mod start_eden;
pub(crate) mod undelete;
pub(crate) mod unlink;
pub(crate) mod unlink_edge;
