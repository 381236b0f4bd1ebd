//! `down`: stops what `up` started.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use clap::Args;

use crate::context::Context;
use crate::failure::{Failure, Outcome, posix_words};
use crate::place::{self, Running};

const LOOKED_EVERY: Duration = Duration::from_millis(20);

/// Stop the cluster that `eggsctl up` started
///
/// Waits until it has drained and its process is gone, for at most --timeout. Its data stays.
#[derive(Debug, Args)]
pub struct Down {
    #[arg(long, env = "EGGS_DATA", value_name = "DIR", help = format!("The cluster's data directory [default: {}]", place::DEFAULT_DATA))]
    data: Option<PathBuf>,
}

impl Down {
    pub async fn run(self, context: &Context) -> Outcome {
        let data =
            place::data(self.data.as_deref()).map_err(|error| Failure::io("data directory", &error))?;
        let on_data = |error: std::io::Error| Failure::refused(data.display(), posix_words(&error));
        if !data.try_exists().map_err(on_data)? {
            return Err(Failure::refused(data.display(), "no cluster is running here: no such directory"));
        }
        let Some(running) = Running::find(&data).map_err(on_data)? else {
            let reason = match Running::unnamed(&data).map_err(on_data)? {
                Some(pid) => {
                    format!("process {pid} has it open but is starting or stopping; try again in a moment")
                }
                None => "no cluster is running here".to_owned(),
            };
            return Err(Failure::refused(data.display(), reason));
        };
        let started = Instant::now();
        running.terminate().map_err(on_data)?;
        while !running.is_gone().map_err(on_data)? {
            if started.elapsed() > context.global.timeout() {
                return Err(Failure::refused(
                    data.display(),
                    format!(
                        "process {pid} was asked to stop and has not after {:.1} s; wait for it, or kill -9 {pid}",
                        started.elapsed().as_secs_f64(),
                        pid = running.pid
                    ),
                ));
            }
            tokio::time::sleep(LOOKED_EVERY).await;
        }
        wait_for_exit(running.pid).await;
        let mut out = context.out();
        out.line(format_args!(
            "stopped process {} in {:.2} s",
            running.pid,
            started.elapsed().as_secs_f64()
        ))?;
        out.finish()
    }
}

/// The lock is given back a moment before the last of the process is gone. One that its parent has
/// not yet asked about (a zombie) counts as gone.
async fn wait_for_exit(pid: i32) {
    for _ in 0..50 {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let state = stat.rsplit(')').next().and_then(|rest| rest.trim_start().chars().next());
        if matches!(state, None | Some('Z' | 'X')) {
            return;
        }
        tokio::time::sleep(LOOKED_EVERY).await;
    }
}
