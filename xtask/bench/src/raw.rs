//! What the machine can do without us: the limits that the figures of suite `data` are read against.

use std::fs::File;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::time::Instant;

use anyhow::{Result, anyhow};
use bytes::Bytes;

use super::measure;
use super::report::Sample;

const CHUNK: usize = 1 << 20;

/// One file written from front to back, then made durable.
pub fn write_fsync(directory: &Path, total: u64, random: &Bytes) -> Result<Sample> {
    let path = directory.join("raw");
    let sample = timed(total, || {
        let mut file = File::create(&path)?;
        for chunk in chunks(total, random) {
            file.write_all(&chunk)?;
        }
        Ok(file.sync_all()?)
    });
    std::fs::remove_file(&path)?;
    sample
}

/// The same bytes through one loopback connection, from one thread to another.
pub fn loopback(total: u64, random: &Bytes) -> Result<Sample> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let addr = listener.local_addr()?;
    timed(total, || {
        let receiver = std::thread::spawn(move || -> std::io::Result<u64> {
            let (mut stream, _) = listener.accept()?;
            let (mut buffer, mut received) = (vec![0; CHUNK], 0);
            loop {
                match stream.read(&mut buffer)? {
                    0 => return Ok(received),
                    n => received += n as u64,
                }
            }
        });
        let mut stream = TcpStream::connect(addr)?;
        for chunk in chunks(total, random) {
            stream.write_all(&chunk)?;
        }
        drop(stream);
        let received = receiver.join().map_err(|_| anyhow!("the receiver failed"))??;
        anyhow::ensure!(received == total, "{received} of {total} bytes came");
        Ok(())
    })
}

fn timed(total: u64, work: impl FnOnce() -> Result<()>) -> Result<Sample> {
    let (cpu, began) = (measure::cpu_seconds("self")?, Instant::now());
    work()?;
    let took = began.elapsed().as_secs_f64();
    let cpu = measure::cpu_seconds("self")? - cpu;
    Ok(sample(total, took, cpu))
}

/// MB/s (10⁶ bytes), and CPU seconds per GiB.
pub fn sample(total: u64, seconds: f64, cpu: f64) -> Sample {
    let gib = total as f64 / f64::from(1 << 30);
    Sample { value: total as f64 / 1e6 / seconds, cpu_per_unit: Some(cpu / gib) }
}

/// `total` bytes, in pieces, going round in `random`.
pub fn chunks(total: u64, random: &Bytes) -> impl Iterator<Item = Bytes> {
    let random = random.clone();
    let mut at = 0_u64;
    std::iter::from_fn(move || {
        let length = (total - at).min(CHUNK as u64) as usize;
        // The buffer is a whole number of chunks.
        let from = (at % random.len() as u64) as usize;
        at += length as u64;
        (length > 0).then(|| random.slice(from..from + length))
    })
}
