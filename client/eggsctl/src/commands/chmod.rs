//! `chmod`: permissions.

use clap::Args;
use eggs_client::AttributeChanges;

use crate::context::{Context, failure};
use crate::failure::{Operands, Outcome};
use crate::paths::ClusterPath;

/// Change permissions
#[derive(Debug, Args)]
pub struct Chmod {
    /// Permissions, octal
    #[arg(value_name = "MODE", value_parser = octal_mode)]
    mode: u32,
    /// Files and directories
    #[arg(required = true, value_name = "PATH", value_parser = ClusterPath::parser())]
    paths: Vec<ClusterPath>,
}

impl Chmod {
    pub async fn run(self, context: &Context) -> Outcome {
        let client = context.client().await?;
        let mut operands = Operands::new(context.command);
        for path in &self.paths {
            let changes = AttributeChanges { mode: Some(self.mode), ..AttributeChanges::default() };
            let changed = client.set_attributes(path.as_bytes(), changes).await;
            operands.note(changed.map_err(|error| failure(path, error)))?;
        }
        operands.finish()
    }
}

/// `644`, `0755`, `1777`.
pub fn octal_mode(text: &str) -> Result<u32, String> {
    match u32::from_str_radix(text, 8) {
        Ok(mode) if mode <= 0o7777 && !text.starts_with('+') => Ok(mode),
        _ => Err("an octal number up to 7777 is expected, as in 0755".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modes_are_octal() {
        assert_eq!(octal_mode("0755"), Ok(0o755));
        assert_eq!(octal_mode("7777"), Ok(0o7777));
        for text in ["", "8", "u+x", "10000", "+7", "-1"] {
            assert!(octal_mode(text).is_err(), "{text}");
        }
    }
}
