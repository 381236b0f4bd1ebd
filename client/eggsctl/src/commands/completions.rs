//! `completions`: what a shell needs to complete our command lines.

use clap::{Args, CommandFactory};

use crate::cli::Cli;
use crate::context::Context;
use crate::failure::Outcome;

/// Print completions for a shell
///
/// For bash: eggsctl completions bash > ~/.local/share/bash-completion/completions/eggsctl
#[derive(Debug, Args)]
pub struct Completions {
    #[arg(value_enum)]
    shell: clap_complete::Shell,
}

impl Completions {
    #[allow(clippy::unused_async)]
    pub async fn run(self, context: &Context) -> Outcome {
        let mut script = Vec::new();
        clap_complete::generate(self.shell, &mut Cli::command(), "eggsctl", &mut script);
        let mut out = context.out();
        out.bytes(&script)?;
        out.finish()
    }
}
