//! What `eggs-blockd` is told: which disks, and what they can fail together with.

use std::path::PathBuf;
use std::str::FromStr;

use clap::{Args, Parser};
use eggs_blockd_core::identity::failure_domain;
use eggs_daemon::args::{ClusterArgs, CommonArgs, HostArgs};
use eggs_proto::limits::{CLASS_FLASH, CLASS_HDD, CLASS_INLINE};

use crate::disk::DiskConfig;

/// Serves the disks of a host to an EggsFS cluster
#[derive(Debug, Clone, Parser)]
#[command(name = "eggs-blockd", version)]
#[command(
    after_help = "eggs-blockd inspect DIR lists the blocks of a disk and says which are damaged or missing, without a cluster."
)]
#[command(mut_arg("listen", |arg| arg.required(false).default_value("127.0.0.1:5003")))]
pub struct BlockdArgs {
    #[command(flatten)]
    pub common: CommonArgs,
    #[command(flatten)]
    pub cluster: ClusterArgs,
    #[command(flatten)]
    pub host: HostArgs,
    #[command(flatten)]
    pub disks: DisksArgs,
}

/// Lists the blocks of disks and says which are damaged or missing, without a cluster
#[derive(Debug, Clone, Parser)]
#[command(name = "eggs-blockd inspect")]
pub struct InspectArgs {
    /// The folder of a disk; may be given many times. It may be in use, nothing in it is changed
    #[arg(required = true)]
    pub disks: Vec<PathBuf>,
}

/// The disks to serve.
#[derive(Debug, Clone, Args)]
pub struct DisksArgs {
    /// A disk: its folder and its storage class (HDD, FLASH or a number from 2), as in /disks/0:HDD.
    /// May be given many times. An empty or absent folder is formatted
    #[arg(long = "disk", value_name = "PATH:CLASS", required = true)]
    pub disk: Vec<DiskSpec>,

    /// What these disks can fail together with, a host or a rack: copies go to different ones
    /// [default: the host's name, see --host]
    #[arg(long, value_name = "NAME", value_parser = domain)]
    pub failure_domain: Option<String>,

    /// Never format a folder: a disk that is not there (not mounted, say) is reported as lost
    #[arg(long)]
    pub no_format: bool,
}

/// One `--disk`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskSpec {
    pub path: PathBuf,
    pub storage_class: u8,
}

impl FromStr for DiskSpec {
    type Err = String;
    fn from_str(text: &str) -> Result<DiskSpec, String> {
        let (path, class) = text
            .rsplit_once(':')
            .filter(|(path, _)| !path.is_empty())
            .ok_or("PATH:CLASS is expected, as in /disks/0:HDD")?;
        Ok(DiskSpec { path: path.into(), storage_class: storage_class(class)? })
    }
}

/// A storage class by name or number.
///
/// # Errors
/// For people: what it may be.
pub fn storage_class(text: &str) -> Result<u8, String> {
    match text.to_ascii_uppercase().as_str() {
        "HDD" => return Ok(CLASS_HDD),
        "FLASH" => return Ok(CLASS_FLASH),
        _ => {}
    }
    match text.parse() {
        Ok(class) if class > CLASS_INLINE => Ok(class),
        _ => {
            Err(format!("'{text}' is not a storage class: HDD, FLASH or a number from 2 to 255 is expected"))
        }
    }
}

fn domain(text: &str) -> Result<String, String> {
    failure_domain(text).map(|()| text.to_owned()).map_err(str::to_owned)
}

impl DisksArgs {
    /// The disks; what they fail together with is `host` when nothing else was said.
    ///
    /// # Errors
    /// When the host has no name to take for a failure domain.
    pub fn configs(&self, host: &HostArgs) -> Result<Vec<DiskConfig>, String> {
        let failure_domain = match &self.failure_domain {
            Some(name) => name.clone(),
            None => host.name()?,
        };
        let config = |spec: &DiskSpec| DiskConfig {
            path: spec.path.clone(),
            storage_class: spec.storage_class,
            failure_domain: failure_domain.clone(),
            expect_existing: self.no_format,
            options: Default::default(),
        };
        Ok(self.disk.iter().map(config).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disks_are_paths_with_a_class() {
        let spec = |text: &str| text.parse::<DiskSpec>();
        let disk = |path: &str, storage_class| Ok(DiskSpec { path: path.into(), storage_class });
        assert_eq!(spec("/disks/0:HDD"), disk("/disks/0", 2));
        assert_eq!(spec("/disks/0:flash"), disk("/disks/0", 3));
        assert_eq!(spec("a:b:17"), disk("a:b", 17));
        for wrong in ["", "/disks/0", ":HDD", "/disks/0:", "/disks/0:1", "/disks/0:256", "/disks/0:TAPE"] {
            assert!(spec(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn settings_come_from_flags_and_environment() {
        let environment = |name: &str| match name {
            "EGGS_DISK" => Some("/a:HDD,/b:FLASH".into()),
            "EGGS_SECRET_FILE" => Some("/secret".into()),
            _ => None,
        };
        let args: BlockdArgs =
            eggs_daemon::config::try_parse(["eggs-blockd", "--failure-domain", "rack 1"], &environment)
                .unwrap();
        let disks = args.disks.configs(&args.host).unwrap();
        assert_eq!(disks.len(), 2);
        assert_eq!(disks[1].path, PathBuf::from("/b"));
        assert_eq!((disks[1].storage_class, disks[1].failure_domain.as_str()), (3, "rack 1"));
        assert_eq!(args.common.listen.port(), 5003);
        let args: BlockdArgs =
            eggs_daemon::config::try_parse(["eggs-blockd", "--host", "h7"], &environment).unwrap();
        assert_eq!(args.disks.configs(&args.host).unwrap()[0].failure_domain, "h7");
        let missing = eggs_daemon::config::try_parse::<BlockdArgs>(["eggs-blockd"], &|_| None);
        assert!(missing.is_err());
    }
}
