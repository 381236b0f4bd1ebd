//! `cat`: file contents to standard output.

use std::ffi::OsString;
use std::os::unix::ffi::OsStrExt as _;

use clap::Args;
use tokio::io::AsyncReadExt as _;

use crate::context::{Context, failure};
use crate::failure::{Failure, Operands, Outcome};
use crate::output::Out;
use crate::paths::ClusterPath;

const STDIN_BYTES: usize = 256 << 10;

/// Print files
///
/// Contents are verified as they are read; missing or damaged blocks are rebuilt from the others.
#[derive(Debug, Args)]
pub struct Cat {
    /// Start at this byte of each file
    #[arg(long, value_name = "BYTES", default_value_t = 0)]
    offset: u64,
    /// Print at most this many bytes of each file
    #[arg(long, value_name = "BYTES")]
    length: Option<u64>,
    /// Files to print; `-` is standard input
    #[arg(required = true, value_name = "PATH", value_parser = Source::parser())]
    paths: Vec<Source>,
}

/// A path in the cluster, or `-`.
#[derive(Debug, Clone)]
enum Source {
    Stdin,
    File(ClusterPath),
}

impl Source {
    fn parser() -> impl clap::builder::TypedValueParser<Value = Source> {
        use clap::builder::TypedValueParser as _;
        clap::builder::OsStringValueParser::new().try_map(|typed: OsString| {
            if typed.as_bytes() == b"-" {
                Ok(Source::Stdin)
            } else {
                ClusterPath::typed(&typed).map(Source::File)
            }
        })
    }
}

impl Cat {
    pub async fn run(self, context: &Context) -> Outcome {
        let mut out = context.out();
        let mut operands = Operands::new(context.command);
        for source in &self.paths {
            let printed = match source {
                Source::Stdin => self.stdin(&mut out).await,
                Source::File(path) => self.file(context, path, &mut out).await,
            };
            // What came before a refusal is seen before it.
            out.flush()?;
            operands.note(printed)?;
        }
        out.finish()?;
        operands.finish()
    }

    async fn file(&self, context: &Context, path: &ClusterPath, out: &mut Out) -> Outcome {
        let client = context.client().await?;
        let file = client.open(path.as_bytes()).await.map_err(|error| failure(path, error))?;
        let mut left = self.length.unwrap_or(u64::MAX).min(file.size().saturating_sub(self.offset));
        if left == 0 {
            return Ok(());
        }
        let mut stream = file.stream(self.offset);
        while left > 0
            && let Some(bytes) = stream.next().await.map_err(|error| failure(path, error))?
        {
            let taken = usize::try_from(left).unwrap_or(usize::MAX).min(bytes.len());
            left -= taken as u64;
            tokio::task::block_in_place(|| out.bytes(&bytes[..taken]))?;
        }
        Ok(())
    }

    async fn stdin(&self, out: &mut Out) -> Outcome {
        let mut input = tokio::io::stdin();
        let mut buffer = vec![0; STDIN_BYTES];
        let (mut skip, mut left) = (self.offset, self.length.unwrap_or(u64::MAX));
        while left > 0 {
            let read =
                input.read(&mut buffer).await.map_err(|error| Failure::io("standard input", &error))?;
            if read == 0 {
                break;
            }
            let skipped = usize::try_from(skip).unwrap_or(usize::MAX).min(read);
            skip -= skipped as u64;
            let taken = usize::try_from(left).unwrap_or(usize::MAX).min(read - skipped);
            left -= taken as u64;
            out.bytes(&buffer[skipped..skipped + taken])?;
            // Somebody may be typing.
            out.flush()?;
        }
        Ok(())
    }
}
