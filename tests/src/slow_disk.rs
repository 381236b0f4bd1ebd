//! A disk that is slow: a file system of its own that is frozen most of the time. What writes to it waits in the
//! kernel until it thaws, as for a device that does not keep up; nothing of ours knows.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

/// Freezes and thaws for as long as the test lives: a killed test must not leave it frozen.
const CYCLE: &str = r#"
while kill -0 "$1" 2>/dev/null; do
    fsfreeze --freeze "$2" && sleep "$3"
    fsfreeze --unfreeze "$2"
    sleep "$4"
done"#;

/// Mounted until it is dropped.
#[derive(Debug)]
pub struct SlowDisk {
    image: PathBuf,
    at: PathBuf,
    cycle: Option<Child>,
}

impl SlowDisk {
    /// A file system of at most `bytes` at the folder `at`, as fast as memory for now. `None` where that is not allowed (it takes
    /// root and a loop device); says so.
    ///
    /// # Panics
    /// When there is no room for it.
    pub fn mount(at: &Path, bytes: u64) -> Option<SlowDisk> {
        let memory = Path::new("/dev/shm");
        let folder = if memory.is_dir() { memory.to_owned() } else { std::env::temp_dir() };
        let image = folder.join(format!("eggs-slow-disk-{}", std::process::id()));
        std::fs::File::create(&image).and_then(|file| file.set_len(bytes)).expect("an image");
        std::fs::create_dir_all(at).expect("a folder");
        let disk = SlowDisk { image, at: at.to_owned(), cycle: None };
        let made = does(Command::new("mkfs.ext4").args(["-q", "-F", "-E", "nodiscard"]).arg(&disk.image))
            && does(Command::new("mount").args(["-o", "loop"]).arg(&disk.image).arg(at))
            && does(Command::new("fsfreeze").arg("--freeze").arg(at))
            && does(Command::new("fsfreeze").arg("--unfreeze").arg(at));
        made.then_some(disk)
    }

    /// From now on it stands still for so many seconds, works for so many, and again.
    ///
    /// # Panics
    /// When there is no shell.
    pub fn slow_down(&mut self, frozen: &str, thawed: &str) {
        let parent = std::process::id().to_string();
        let mut shell = Command::new("sh");
        shell.args(["-c", CYCLE, "sh", &parent]).arg(&self.at).args([frozen, thawed]);
        shell.stdin(Stdio::null()).stderr(Stdio::null());
        self.cycle = Some(shell.spawn().expect("a shell"));
    }

    /// As fast as memory again.
    pub fn speed_up(&mut self) {
        let Some(mut cycle) = self.cycle.take() else { return };
        let _ = cycle.kill();
        let _ = cycle.wait();
        // A freeze that was under way as it was killed may still come: until nothing is left to thaw.
        for _ in 0..2 {
            let _ = Command::new("fsfreeze").arg("--unfreeze").arg(&self.at).stderr(Stdio::null()).status();
            std::thread::sleep(std::time::Duration::from_millis(50));
        }
    }
}

impl Drop for SlowDisk {
    fn drop(&mut self) {
        self.speed_up();
        let _ = Command::new("umount").arg("-l").arg(&self.at).stderr(Stdio::null()).status();
        let _ = std::fs::remove_file(&self.image);
    }
}

/// Runs to its end; says why it did not work.
fn does(command: &mut Command) -> bool {
    match command.stdin(Stdio::null()).output() {
        Ok(output) if output.status.success() => true,
        Ok(output) => {
            println!("skipped: {command:?}: {}", String::from_utf8_lossy(&output.stderr).trim());
            false
        }
        Err(error) => {
            println!("skipped: {command:?}: {error}");
            false
        }
    }
}
