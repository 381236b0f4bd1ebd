//! What the machine can do without us: the limits that the figures of suite `data` are read against.

use std::fs::File;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::time::Instant;

use anyhow::{Result, anyhow};
use bytes::{Bytes, BytesMut};

use eggs_client_core::encode::encode;
use eggs_client_core::layout::Layout;

use crate::Setup;
use crate::measure;
use crate::report::{Report, Sample};

const CHUNK: usize = 1 << 20;
const GIB: u64 = 1 << 30;
const CELL_BYTES: u32 = 256 << 10;

/// The limits: the disk, the loopback, and the code with all its CRCs, on one thread.
pub fn rows(setup: &Setup, report: &mut Report, random: &Bytes) -> Result<()> {
    let [mut disk, mut network, mut code, mut wide_code, mut crc]: [Vec<Sample>; 5] = Default::default();
    for _ in 0..setup.runs {
        disk.push(write_fsync(setup.scratch.path(), GIB, random)?);
        network.push(loopback(GIB, random)?);
        code.push(coded(GIB, random, 4, 2)?);
        wide_code.push(coded(GIB, random, 10, 4)?);
        crc.push(timed(GIB, || {
            for chunk in chunks(GIB, random) {
                std::hint::black_box(crc32fast::hash(&chunk));
            }
            Ok(())
        })?);
    }
    report.row("raw_write_fsync", 1, "MB/s", &disk);
    report.row("raw_loopback", 1, "MB/s", &network);
    report.row("raw_encode_4_2", 1, "MB/s", &code);
    report.row("raw_encode_10_4", 1, "MB/s", &wide_code);
    report.row("raw_crc", 1, "MB/s", &crc);
    Ok(())
}

/// What a client does to the bytes of spans before it sends them: parity, and a CRC of everything.
fn coded(total: u64, random: &Bytes, data: u32, parity: u32) -> Result<Sample> {
    let size = random.len() as u32;
    let layout = Layout::choose(size, data, parity, CELL_BYTES)?;
    let (mut spare, mut span) = (Vec::new(), BytesMut::with_capacity(layout.capacity()));
    span.extend_from_slice(random);
    timed(total, || {
        for _ in 0..total / u64::from(size) {
            let (data, parity) = encode(std::mem::take(&mut span), layout, &mut spare)?.into_buffers();
            span = data.ok_or_else(|| anyhow!("the span is still in use"))?;
            span.truncate(size as usize);
            spare = parity;
        }
        Ok(())
    })
}

/// One file written from front to back, then made durable.
fn write_fsync(directory: &Path, total: u64, random: &Bytes) -> Result<Sample> {
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
fn loopback(total: u64, random: &Bytes) -> Result<Sample> {
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

/// Times some work on `total` bytes.
pub fn timed(total: u64, work: impl FnOnce() -> Result<()>) -> Result<Sample> {
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
