//! `checksum`: sums of files' contents, as people compare them.

use std::borrow::Cow;

use clap::{Args, ValueEnum};
use eggs_client::{Client, FileReader};
use serde_json::{Value, json};
use sha2::Digest as _;

use crate::cli::JsonFlag;
use crate::context::{Context, failure};
use crate::failure::{Failure, Operands, Outcome};
use crate::output::{JsonPath, hex};
use crate::paths::ClusterPath;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
enum Algorithm {
    /// CRC-32 (ISO-HDLC), as gzip and zip have it; every file's is known without reading it
    #[default]
    Crc32,
    Sha256,
    Blake3,
}

/// Print checksums of files
///
/// One line per file, as `sha256sum` and `b3sum` print it: of a name with a newline, a carriage return or a backslash they are
/// written as \n, \r and \\, and the line begins with a backslash. The CRC-32 comes from the metadata at once, the others from
/// reading the file (every read is verified on the way).
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  eggsctl checksum /data/f\n  eggsctl checksum -a sha256 /data/f | (cd local/data && sed 's|/data/||' | sha256sum -c)\n  eggsctl checksum -a crc32 --read /data/f"
)]
pub struct Checksum {
    /// Which one
    #[arg(short, long, value_enum, default_value_t)]
    algorithm: Algorithm,
    /// Read the file for its CRC-32 too
    #[arg(long)]
    read: bool,
    #[command(flatten)]
    json: JsonFlag,
    /// Files
    #[arg(required = true, value_name = "PATH", value_parser = ClusterPath::parser())]
    paths: Vec<ClusterPath>,
}

/// A sum in the making.
enum Sum {
    Crc32(crc32fast::Hasher),
    Sha256(Box<sha2::Sha256>),
    Blake3(Box<blake3::Hasher>),
}

impl Sum {
    fn new(algorithm: Algorithm) -> Sum {
        match algorithm {
            Algorithm::Crc32 => Sum::Crc32(crc32fast::Hasher::new()),
            Algorithm::Sha256 => Sum::Sha256(Box::default()),
            Algorithm::Blake3 => Sum::Blake3(Box::default()),
        }
    }

    fn update(&mut self, bytes: &[u8]) {
        match self {
            Sum::Crc32(sum) => sum.update(bytes),
            Sum::Sha256(sum) => sum.update(bytes),
            Sum::Blake3(sum) => drop(sum.update(bytes)),
        }
    }

    fn finish(self) -> String {
        match self {
            Sum::Crc32(sum) => format!("{:08x}", sum.finalize()),
            Sum::Sha256(sum) => hex(&sum.finalize()),
            Sum::Blake3(sum) => hex(sum.finalize().as_bytes()),
        }
    }
}

impl Algorithm {
    fn name(self) -> &'static str {
        match self {
            Algorithm::Crc32 => "crc32",
            Algorithm::Sha256 => "sha256",
            Algorithm::Blake3 => "blake3",
        }
    }
}

impl Checksum {
    pub async fn run(self, context: &Context) -> Outcome {
        let client = context.client().await?;
        let mut out = context.out();
        let mut operands = Operands::new(context.command);
        let mut documents = Vec::new();
        for path in &self.paths {
            match self.sum(client, path).await {
                Ok((sum, size)) if self.json.json => documents.push(self.document(path, &sum, size)),
                Ok((sum, _)) => {
                    let (mark, name) = one_line(path.as_bytes());
                    out.named_line(&format!("{mark}{sum}  "), &name, None, b"")?;
                    out.flush()?;
                }
                Err(error) => operands.note(Err(error))?,
            }
        }
        if self.json.json {
            out.json(&documents)?;
        }
        out.finish()?;
        operands.finish()
    }

    fn document(&self, path: &ClusterPath, sum: &str, size: u64) -> Value {
        let JsonPath { path, path_hex } = JsonPath::of(path.as_bytes());
        let mut document =
            json!({ "path": path, "algorithm": self.algorithm.name(), "checksum": sum, "size": size });
        if let Some(hex) = path_hex {
            document["path_hex"] = hex.into();
        }
        document
    }

    async fn sum(&self, client: &Client, path: &ClusterPath) -> Outcome<(String, u64)> {
        let file = client.open(path.as_bytes()).await.map_err(|error| failure(path, error))?;
        let known = file.metadata().crc.filter(|_| self.algorithm == Algorithm::Crc32 && !self.read);
        let sum = match known {
            Some(crc) => format!("{crc:08x}"),
            None => self.read(&file, path).await?,
        };
        Ok((sum, file.size()))
    }

    async fn read(&self, file: &FileReader, path: &ClusterPath) -> Outcome<String> {
        let mut sum = Sum::new(self.algorithm);
        let mut stream = file.stream(0);
        while let Some(bytes) = stream.next().await.map_err(|error| failure(path, error))? {
            // Computing takes longer than reading: not where others wait for their turn.
            let summed = tokio::task::spawn_blocking(move || {
                sum.update(&bytes);
                sum
            });
            sum = summed.await.map_err(|error| Failure::refused(path, error))?;
        }
        Ok(sum.finish())
    }
}

/// A name as the coreutils print it in a line of its own, and what the line begins with.
fn one_line(name: &[u8]) -> (&'static str, Cow<'_, [u8]>) {
    if !name.iter().any(|byte| matches!(byte, b'\n' | b'\r' | b'\\')) {
        return ("", Cow::Borrowed(name));
    }
    let escaped = name.iter().flat_map(|byte| match byte {
        b'\n' => b"\\n".as_slice(),
        b'\r' => b"\\r",
        b'\\' => b"\\\\",
        byte => std::slice::from_ref(byte),
    });
    ("\\", escaped.copied().collect::<Vec<u8>>().into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_never_break_a_line() {
        let line = |name: &[u8]| {
            let (mark, name) = one_line(name);
            (mark, name.into_owned())
        };
        assert_eq!(line(b"/plain \xff"), ("", b"/plain \xff".to_vec()));
        assert_eq!(line(b"/a\nb\\c\rd"), ("\\", br"/a\nb\\c\rd".to_vec()));
    }

    #[test]
    fn known_sums() {
        for (algorithm, expected) in [
            (Algorithm::Crc32, "352441c2"),
            (Algorithm::Sha256, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"),
            (Algorithm::Blake3, "6437b3ac38465133ffb63b75273a8db548c558465d79db03fd359c6cd5bd9d85"),
        ] {
            let mut sum = Sum::new(algorithm);
            sum.update(b"a");
            sum.update(b"bc");
            assert_eq!(sum.finish(), expected);
        }
    }
}
