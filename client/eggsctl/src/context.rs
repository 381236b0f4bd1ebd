//! What a running command has at hand: the cluster, standard output, its own name.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use eggs_client::{Client, ClientError, ClusterSecret, CreateOptions, NewAttributes, Options, Replace};

use crate::cli::{Global, SecretArgs};
use crate::failure::{Failure, Outcome, posix_words};
use crate::output::Out;
use crate::place;

/// One per process.
#[derive(Debug)]
pub struct Context {
    pub command: &'static str,
    pub global: Global,
    client: OnceLock<Client>,
}

impl Context {
    pub fn new(command: &'static str, global: Global) -> Context {
        Context { command, global, client: OnceLock::new() }
    }

    /// Connects at the first call.
    pub async fn client(&self) -> Outcome<&Client> {
        if let Some(client) = self.client.get() {
            return Ok(client);
        }
        let client = self.connect(None).await?;
        Ok(self.client.get_or_init(|| client))
    }

    /// A client that shows the cluster's secret where it is asked for.
    pub async fn admin(&self, secret: &SecretArgs) -> Outcome<&Client> {
        let secret = load_secret(secret)?;
        let client = self.connect(Some(secret)).await?;
        Ok(self.client.get_or_init(|| client))
    }

    async fn connect(&self, secret: Option<ClusterSecret>) -> Outcome<Client> {
        let options = Options {
            shuckle: self.global.shuckle.clone(),
            timeout: self.global.timeout(),
            secret,
            ..Options::default()
        };
        let started = Instant::now();
        let client = Client::connect(options).await.map_err(|error| failure("", error))?;
        tracing::debug!(cluster = %client.cluster_id(), took = ?started.elapsed(), "connected");
        Ok(client)
    }

    /// Lets the library finish what it does in the background.
    pub async fn close(&self, patience: Duration) {
        if let Some(client) = self.client.get()
            && tokio::time::timeout(patience, client.close()).await.is_err()
        {
            tracing::debug!("background work of the client was left undone");
        }
    }

    pub fn out(&self) -> Out {
        Out::new(self.global.color)
    }
}

/// The secret that was named, else that of the cluster that `up` runs here.
fn load_secret(typed: &SecretArgs) -> Outcome<ClusterSecret> {
    let load = |path: &Path| {
        let secret = eggs_daemon::Secret::load(path).map_err(|error| Failure::refused("", error))?;
        Ok(ClusterSecret::new(secret.to_bytes()))
    };
    if let Some(path) = &typed.secret_file {
        return load(path);
    }
    let data = std::env::var_os("EGGS_DATA").filter(|data| !data.is_empty()).map(PathBuf::from);
    let data = place::data(data.as_deref()).map_err(|error| Failure::io("data directory", &error))?;
    let path = data.join("secret");
    if !path.exists() {
        let path = path.display();
        let reason = format!(
            "this changes the cluster and needs its secret: say where it is with --secret-file (there is no {path})"
        );
        return Err(Failure::Usage(reason));
    }
    load(&path)
}

/// The library's error, said of what was typed. Its own path is preferred when it is one: it may be
/// a directory on the way.
pub fn failure(subject: impl fmt::Display, error: ClientError) -> Failure {
    match error {
        ClientError::Refused { reason, path, .. } => {
            if path.starts_with('/') {
                Failure::refused(path, reason)
            } else {
                Failure::refused(subject, reason)
            }
        }
        ClientError::Unreachable { .. } => Failure::Unreachable(error.to_string()),
        ClientError::Local { what, error } => Failure::refused(what, posix_words(&error)),
        ClientError::DataLost { file, offset, missing, .. } => Failure::refused(
            subject,
            format!("input/output error: data lost in {file}, span at {offset}: {missing}"),
        ),
        ClientError::Corrupt { file, what, .. } => {
            Failure::refused(subject, format!("input/output error: {file} is corrupt: {what}"))
        }
        ClientError::WriteFailed { what, .. } => {
            Failure::refused(subject, format!("input/output error: {what}"))
        }
        ClientError::Invalid(_) | ClientError::Protocol(_) => Failure::refused(subject, error),
    }
}

/// Attributes of what this user makes.
pub fn attributes(mode: u32, mtime: Option<eggs_proto::Time>) -> NewAttributes {
    NewAttributes {
        mode: mode & 0o7777,
        uid: rustix::process::geteuid().as_raw(),
        gid: rustix::process::getegid().as_raw(),
        mtime: mtime.map(|time| time.0),
    }
}

/// How to make a file of this user's.
pub fn create_options(mode: u32, mtime: Option<eggs_proto::Time>, replace: Replace) -> CreateOptions {
    CreateOptions { attributes: Some(attributes(mode, mtime)), replace, size_hint: None }
}

#[cfg(test)]
mod tests {
    use super::*;
    use eggs_client::Refusal;

    #[test]
    fn the_librarys_words_become_ours() {
        let refused = |path: &str| ClientError::Refused {
            kind: Refusal::Exists,
            reason: "file exists".into(),
            path: path.into(),
        };
        let line = |error| failure("/data", error).line("mkdir").unwrap();
        assert_eq!(line(refused("/data")), "eggsctl: mkdir: /data: file exists");
        assert_eq!(line(refused("0x0020000000000000")), "eggsctl: mkdir: /data: file exists");
        let gone = failure(
            "",
            ClientError::Unreachable {
                tried: "127.0.0.1:5000: refused".into(),
                after: Duration::from_secs(2),
            },
        );
        assert_eq!(gone.exit_code(), 3);
        let line = gone.line("ls").unwrap();
        assert!(line.contains("127.0.0.1:5000") && line.contains("2.0 s"), "{line}");
    }
}
