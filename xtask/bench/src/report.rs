//! Rows, the table a person reads and the JSON a program reads.

use std::path::Path;

use anyhow::Result;
use comfy_table::{CellAlignment, Table, presets};
use serde::Serialize;

use super::floors::{self, Bound};
use super::measure::{load1, median};

/// What a suite found.
#[derive(Debug, Serialize)]
pub struct Report {
    suite: &'static str,
    /// Load average of the last minute when the suite began: what else the machine was doing.
    load1: f64,
    rows: Vec<Row>,
}

#[derive(Debug, Serialize)]
struct Row {
    name: &'static str,
    /// Concurrent clients; 0 where there is no client.
    clients: u32,
    median: f64,
    min: f64,
    max: f64,
    unit: &'static str,
    /// CPU seconds of server and clients per operation, entry or GiB; null where it says nothing.
    cpu_per_unit: Option<f64>,
}

/// One run's figure.
#[derive(Debug, Clone, Copy)]
pub struct Sample {
    pub value: f64,
    pub cpu_per_unit: Option<f64>,
}

impl From<f64> for Sample {
    fn from(value: f64) -> Sample {
        Sample { value, cpu_per_unit: None }
    }
}

impl Report {
    pub fn begin(suite: &'static str) -> Result<Report> {
        Ok(Report { suite, load1: load1()?, rows: Vec::new() })
    }

    /// Adds a row and says it at once.
    pub fn row(&mut self, name: &'static str, clients: u32, unit: &'static str, samples: &[Sample]) {
        let values: Vec<f64> = samples.iter().map(|sample| sample.value).collect();
        let cpu: Vec<f64> = samples.iter().filter_map(|sample| sample.cpu_per_unit).collect();
        let row = Row {
            name,
            clients,
            median: rounded(median(&values)),
            min: rounded(values.iter().copied().fold(f64::INFINITY, f64::min)),
            max: rounded(values.iter().copied().fold(f64::NEG_INFINITY, f64::max)),
            unit,
            cpu_per_unit: (!cpu.is_empty()).then(|| rounded(median(&cpu))),
        };
        eprintln!("{name} ({clients} clients): {} {unit}", row.median);
        self.rows.push(row);
    }

    pub fn print(&self) -> Result<()> {
        let mut table = Table::new();
        table.load_preset(presets::ASCII_MARKDOWN);
        table.set_header(["name", "clients", "median", "min", "max", "unit", "cpu", "floor", ""]);
        for at in [1, 2, 3, 4, 6, 7] {
            if let Some(column) = table.column_mut(at) {
                column.set_cell_alignment(CellAlignment::Right);
            }
        }
        for row in &self.rows {
            let (floor, verdict) = self.judged(row);
            table.add_row([
                row.name.to_owned(),
                row.clients.to_string(),
                row.median.to_string(),
                row.min.to_string(),
                row.max.to_string(),
                row.unit.to_owned(),
                shown_cpu(row),
                floor,
                verdict,
            ]);
        }
        println!("{table}");
        println!("load average: {} before, {} after", self.load1, load1()?);
        Ok(())
    }

    /// The floor of a row in words, and whether it holds.
    fn judged(&self, row: &Row) -> (String, String) {
        let limit = floors::limit_of(self.suite, row.name);
        let limit = limit.and_then(|limit| self.rows.iter().find(|other| other.name == limit));
        let bound = floors::of(self.suite, row.name, row.clients).map(|bound| match (bound, limit) {
            (Bound::AtLeast(floor), Some(limit)) => Bound::AtLeast(rounded(floor.min(limit.median / 2.0))),
            (bound, _) => bound,
        });
        let value = bound.map(|bound| (bound, row.median, ""));
        let cpu = floors::of_cpu(self.suite, row.name, row.clients);
        let cpu = cpu.and_then(|bound| Some((bound, row.cpu_per_unit?, " CPU-s")));
        let bounds: Vec<_> = value.into_iter().chain(cpu).collect();
        let words: Vec<String> = bounds.iter().map(|(bound, _, unit)| bound.shown() + unit).collect();
        let verdict = match bounds.iter().all(|(bound, value, _)| bound.holds(*value)) {
            _ if bounds.is_empty() => "",
            true => "pass",
            false => "BELOW",
        };
        (words.join(", "), verdict.to_owned())
    }

    pub fn write(&self, file: &Path) -> Result<()> {
        let mut json = serde_json::to_string_pretty(self)?;
        json.push('\n');
        std::fs::write(file, json)?;
        Ok(())
    }
}

fn shown_cpu(row: &Row) -> String {
    match row.cpu_per_unit {
        None => String::new(),
        Some(cpu) if row.unit == "MB/s" => format!("{cpu:.2} s/GiB"),
        Some(cpu) => format!("{:.1} µs", cpu * 1e6),
    }
}

/// Four significant digits: more would be noise.
fn rounded(value: f64) -> f64 {
    if value == 0.0 || !value.is_finite() {
        return value;
    }
    format!("{value:.3e}").parse().unwrap_or(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_json_has_the_agreed_shape() {
        let mut report = Report { suite: "meta", load1: 0.5, rows: Vec::new() };
        let sample = |value| Sample { value, cpu_per_unit: Some(value / 1e9) };
        report.row("create_empty", 16, "ops/s", &[sample(6000.0), sample(4000.0), sample(5000.4)]);
        report.row("idle", 0, "%", &[0.25.into()]);
        let json: serde_json::Value = serde_json::to_value(&report).unwrap();
        let expected = serde_json::json!({"suite": "meta", "load1": 0.5, "rows": [
            {"name": "create_empty", "clients": 16, "median": 5000.0, "min": 4000.0, "max": 6000.0,
             "unit": "ops/s", "cpu_per_unit": 5e-6},
            {"name": "idle", "clients": 0, "median": 0.25, "min": 0.25, "max": 0.25, "unit": "%",
             "cpu_per_unit": null},
        ]});
        assert_eq!(json, expected);
    }

    #[test]
    fn a_floor_is_judged_on_the_median() {
        let mut report = Report { suite: "data", load1: 0.0, rows: Vec::new() };
        let sample = |value, cpu| Sample { value, cpu_per_unit: Some(cpu) };
        report.row("put_1gib", 1, "MB/s", &[sample(401.0, 3.9)]);
        report.row("put_1gib", 1, "MB/s", &[sample(401.0, 4.1)]);
        report.row("put_1gib", 1, "MB/s", &[sample(399.0, 1.0)]);
        report.row("raw_crc", 1, "MB/s", &[1.0.into()]);
        let verdicts =
            |report: &Report| report.rows.iter().map(|row| report.judged(row).1).collect::<Vec<_>>();
        assert_eq!(verdicts(&report), ["pass", "BELOW", "BELOW", ""]);
        // Half of what the machine does is enough.
        report.row("raw_write_fsync", 1, "MB/s", &[798.0.into()]);
        assert_eq!(verdicts(&report), ["pass", "BELOW", "pass", "", ""]);
    }

    #[test]
    fn figures_keep_four_digits() {
        assert_eq!(rounded(123_456.0), 123_500.0);
        assert_eq!(rounded(0.001_234_56), 0.001_235);
        assert_eq!(rounded(0.0), 0.0);
    }
}
