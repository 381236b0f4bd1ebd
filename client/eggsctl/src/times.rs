//! Times as people type and read them.
//!
//! Typed: RFC 3339, a date or a date with a time (local), a duration before now (`5m`, `2h 30m ago`),
//! `@SECONDS` or plain nanoseconds since the Unix epoch — the form `stat` and `--json` print.

use std::time::Duration;

use eggs_proto::Time;
use jiff::Timestamp;
use jiff::civil::DateTime;
use jiff::tz::TimeZone;

/// What the options that take a time accept, for their help.
pub const FORMS: &str = "RFC 3339, '2026-11-21 14:30' (local), '5m ago', @SECONDS or nanoseconds since 1970";

/// Now, by this machine's clock.
pub fn now() -> Time {
    Time(u64::try_from(Timestamp::now().as_nanosecond()).unwrap_or(0))
}

/// For clap.
pub fn typed(text: &str) -> Result<Time, String> {
    // The unset instant means now, or all of time: nobody who types a time means that.
    parse(text, now(), &TimeZone::system()).map(|time| Time(time.0.max(1)))
}

/// An instant; relative ones count back from `now`.
pub fn parse(text: &str, now: Time, zone: &TimeZone) -> Result<Time, String> {
    let text = text.trim();
    if text == "now" {
        return Ok(now);
    }
    if let Some(seconds) = text.strip_prefix('@') {
        let seconds: f64 = seconds.parse().map_err(|_| format!("'{seconds}' is not a number of seconds"))?;
        return Duration::try_from_secs_f64(seconds)
            .map(|since| Time::ZERO.saturating_add(since))
            .map_err(|_| format!("'@{seconds}' is out of range"));
    }
    if !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit()) {
        return text.parse().map(Time).map_err(|_| format!("{text} nanoseconds is out of range"));
    }
    let before = text.strip_suffix("ago").unwrap_or(text).trim();
    if let Ok(duration) = humantime::parse_duration(before) {
        let nanoseconds = u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
        return now
            .0
            .checked_sub(nanoseconds)
            .map(Time)
            .ok_or_else(|| format!("'{text}' is before the year 1970"));
    }
    let timestamp = text
        .parse::<Timestamp>()
        .or_else(|_| {
            text.parse::<DateTime>().and_then(|civil| civil.to_zoned(zone.clone())).map(|z| z.timestamp())
        })
        .map_err(|_| format!("'{text}' is no time; use {FORMS}"))?;
    u64::try_from(timestamp.as_nanosecond())
        .map(Time)
        .map_err(|_| format!("'{text}' is before the year 1970"))
}

/// A duration with its unit: `30s`, `500ms`; a bare number is seconds.
pub fn typed_duration(text: &str) -> Result<Duration, String> {
    let parsed = match text.parse::<f64>() {
        Ok(seconds) => Duration::try_from_secs_f64(seconds).map_err(|error| error.to_string())?,
        Err(_) => humantime::parse_duration(text).map_err(|error| error.to_string())?,
    };
    if parsed.is_zero() { Err("must be more than zero".to_owned()) } else { Ok(parsed) }
}

fn timestamp(time: Time) -> Option<Timestamp> {
    Timestamp::from_nanosecond(i128::from(time.0)).ok()
}

/// RFC 3339 in UTC with nanoseconds: reads back as the same instant.
pub fn rfc3339(time: Time) -> String {
    timestamp(time).map_or_else(|| time.0.to_string(), |stamp| format!("{stamp:.9}"))
}

/// `2026-11-21 14:30:05` in the local time zone.
pub fn local(time: Time, zone: &TimeZone) -> String {
    timestamp(time).map_or_else(
        || time.0.to_string(),
        |stamp| stamp.to_zoned(zone.clone()).strftime("%Y-%m-%d %H:%M:%S").to_string(),
    )
}

/// How long ago, short: `3s`, `12m`, `5d`.
pub fn age(time: Time, now: Time) -> String {
    if time.is_unset() {
        return "never".to_owned();
    }
    let seconds = now.since(time).as_secs();
    match seconds {
        0..=119 => format!("{seconds}s ago"),
        120..=7199 => format!("{}m ago", seconds / 60),
        7200..=172_799 => format!("{}h ago", seconds / 3600),
        _ => format!("{}d ago", seconds / 86_400),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Time = Time(1_700_000_000_000_000_000);

    #[test]
    fn every_form_is_read() {
        for (text, expected) in [
            ("now", NOW.0),
            ("123", 123),
            ("@1.5", 1_500_000_000),
            ("5m ago", NOW.0 - 300_000_000_000),
            ("5m", NOW.0 - 300_000_000_000),
            ("1h 30m ago", NOW.0 - 5_400_000_000_000),
            ("2023-11-14T22:13:20Z", NOW.0),
            ("2023-11-14T23:13:20.000000001+01:00", NOW.0 + 1),
            ("2023-11-14 22:13:20", NOW.0),
            ("2023-11-14", 1_699_920_000_000_000_000),
        ] {
            assert_eq!(parse(text, NOW, &TimeZone::UTC), Ok(Time(expected)), "{text}");
        }
    }

    #[test]
    fn what_is_no_time_is_refused() {
        for text in
            ["", "yesterdayish", "@x", "@-1", "1960-01-01", "99999999999999999999999", "9999 years ago"]
        {
            assert!(parse(text, NOW, &TimeZone::UTC).is_err(), "{text}");
        }
    }

    #[test]
    fn printed_times_read_back() {
        let time = Time(1_700_000_000_123_456_789);
        assert_eq!(rfc3339(time), "2023-11-14T22:13:20.123456789Z");
        assert_eq!(parse(&rfc3339(time), NOW, &TimeZone::UTC), Ok(time));
        assert_eq!(rfc3339(Time(1_700_000_000_000_000_000)), "2023-11-14T22:13:20.000000000Z");
        assert_eq!(local(time, &TimeZone::UTC), "2023-11-14 22:13:20");
        // The clock can hold what the calendar cannot.
        assert!(!rfc3339(Time::MAX).is_empty());
    }

    #[test]
    fn durations() {
        assert_eq!(typed_duration("30s"), Ok(Duration::from_secs(30)));
        assert_eq!(typed_duration("2"), Ok(Duration::from_secs(2)));
        assert_eq!(typed_duration("500ms"), Ok(Duration::from_millis(500)));
        assert!(typed_duration("0").is_err());
        assert!(typed_duration("-1").is_err());
        assert!(typed_duration("soon").is_err());
    }

    #[test]
    fn ages() {
        assert_eq!(age(Time(NOW.0 - 3_000_000_000), NOW), "3s ago");
        assert_eq!(age(Time::ZERO, NOW), "never");
        assert_eq!(age(Time(NOW.0 + 5), NOW), "0s ago");
    }
}
