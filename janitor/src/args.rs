//! What `eggs-janitor` is told; `eggsctl up` takes the same settings.

use std::time::Duration;

use clap::{Args, Parser};
use eggs_daemon::args::{ClusterArgs, CommonArgs, HostArgs};
use eggs_janitor_core::lost::Limits;
use eggs_janitor_core::scrub::PERIOD_MIN;

/// Repairs, checks, balances and cleans up an EggsFS cluster
///
/// One per cluster works; others that run stand by and take over when it is not heard of any more.
#[derive(Debug, Clone, Parser)]
#[command(name = "eggs-janitor", version)]
#[command(mut_arg("listen", |arg| arg.required(false).default_value("127.0.0.1:5005")))]
pub struct JanitorArgs {
    #[command(flatten)]
    pub common: CommonArgs,
    #[command(flatten)]
    pub cluster: ClusterArgs,
    #[command(flatten)]
    pub host: HostArgs,
    #[command(flatten)]
    pub settings: Settings,
}

/// How fast, how often, how much by itself.
#[derive(Debug, Clone, PartialEq, Eq, Args)]
pub struct Settings {
    /// MB (10⁶ bytes) per second that repair and balancing may write; 0: no limit
    #[arg(long, value_name = "MB", default_value_t = 0)]
    pub repair_rate: u64,

    /// Percent of the time that each repair under way may keep its disks busy; it rests for the others
    #[arg(long, value_name = "PERCENT", default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=100))]
    pub disk_share: u32,

    /// Spans that are repaired at the same time
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=256))]
    pub repairs_in_flight: u32,

    /// MiB of blocks held in memory at the same time, at least the largest block
    #[arg(long, value_name = "MIB", default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    pub repair_memory: u32,

    /// Every block is looked at once in this time, as in 30days or 12h; 0s: never
    #[arg(long, value_name = "TIME", default_value = "30days", value_parser = period)]
    pub scrub_period: Duration,

    /// MB per second that are looked at, at most; 0: as many as the period needs
    #[arg(long, value_name = "MB", default_value_t = 0)]
    pub scrub_rate: u64,

    /// A disk that was away for this long is given up and its blocks are made anew; 0s: people decide
    #[arg(long, value_name = "TIME", default_value = "15min", value_parser = duration)]
    pub lost_after: Duration,

    /// Disks that may be given up at the same time without being asked …
    #[arg(long, value_name = "N", default_value_t = Limits::default().disks)]
    pub lost_max: u32,

    /// … or this share of all disks in percent, if that is more
    #[arg(long, value_name = "PERCENT", default_value_t = Limits::default().share_percent, value_parser = clap::value_parser!(u32).range(0..=100))]
    pub lost_share: u32,

    /// Erase what nobody needs any more this often
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = duration)]
    pub garbage_interval: Duration,

    /// Look this often for spans with several blocks in one failure domain, and spread those that can be; and soon after
    /// failure domains come or go; 0s: never
    #[arg(long, value_name = "TIME", default_value = "1h", value_parser = duration)]
    pub spread_interval: Duration,

    /// Do not even out how full disks are
    #[arg(long)]
    pub no_rebalance: bool,
}

impl Default for Settings {
    fn default() -> Settings {
        /// To parse nothing.
        #[derive(Parser)]
        struct Nothing {
            #[command(flatten)]
            settings: Settings,
        }
        Nothing::parse_from(["janitor"]).settings
    }
}

impl Settings {
    pub(crate) fn limits(&self) -> Limits {
        let after = Some(self.lost_after).filter(|after| !after.is_zero());
        Limits { after, disks: self.lost_max, share_percent: self.lost_share, ..Limits::default() }
    }

    /// As flags: what starts this program again with the same settings.
    pub fn to_flags(&self) -> Vec<String> {
        let time = |time: Duration| humantime::format_duration(time).to_string().replace(' ', "");
        let mut flags = Vec::new();
        let mut flag = |name: &str, value: String| flags.extend([format!("--{name}"), value]);
        flag("repair-rate", self.repair_rate.to_string());
        flag("disk-share", self.disk_share.to_string());
        flag("repairs-in-flight", self.repairs_in_flight.to_string());
        flag("repair-memory", self.repair_memory.to_string());
        flag("scrub-period", time(self.scrub_period));
        flag("scrub-rate", self.scrub_rate.to_string());
        flag("lost-after", time(self.lost_after));
        flag("lost-max", self.lost_max.to_string());
        flag("lost-share", self.lost_share.to_string());
        flag("garbage-interval", time(self.garbage_interval));
        flag("spread-interval", time(self.spread_interval));
        if self.no_rebalance {
            flags.push("--no-rebalance".to_owned());
        }
        flags
    }
}

fn duration(text: &str) -> Result<Duration, String> {
    humantime::parse_duration(text).map_err(|error| format!("{error}; as in 15min or 2h 30min"))
}

fn period(text: &str) -> Result<Duration, String> {
    let period = duration(text)?;
    if !period.is_zero() && period < PERIOD_MIN {
        return Err(format!("{} s is the shortest", PERIOD_MIN.as_secs()));
    }
    Ok(period)
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[derive(Debug, Parser)]
    struct Only {
        #[command(flatten)]
        settings: Settings,
    }

    #[test]
    fn the_arguments_hold_together() {
        JanitorArgs::command().debug_assert();
        assert_eq!(Settings::default().limits(), Limits::default());
    }

    #[test]
    fn flags_give_the_same_settings_again() {
        let times = ["x", "--scrub-period", "1h 30min", "--lost-after", "0s", "--spread-interval", "0s"];
        let typed = times.iter().chain(&["--no-rebalance", "--repair-rate", "7"]);
        let settings = Only::parse_from(typed).settings;
        assert_eq!((settings.limits().after, settings.spread_interval), (None, Duration::ZERO));
        let flags = std::iter::once("x".to_owned()).chain(settings.to_flags());
        assert_eq!(Only::parse_from(flags).settings, settings);
    }

    #[test]
    fn nonsense_is_refused() {
        for wrong in [
            ["--scrub-period", "1s"],
            ["--lost-after", "soon"],
            ["--disk-share", "0"],
            ["--repair-memory", "0"],
        ] {
            assert!(Only::try_parse_from(["x"].iter().chain(&wrong)).is_err(), "{wrong:?}");
        }
    }
}
