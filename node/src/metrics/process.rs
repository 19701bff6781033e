//! The process, as Prometheus's client libraries describe it. What /proc does not say is left out.

use std::fs;

use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Registry;

/// Ticks of /proc/PID/stat in a second: fixed on Linux (USER_HZ).
const TICKS: f64 = 100.0;
const KIB: i64 = 1024;

pub(super) fn now() -> Registry {
    let mut registry = Registry::with_prefix("process");
    let stat = fs::read_to_string("/proc/self/stat").unwrap_or_default();
    // The name in the second field may hold anything; the third field follows the last parenthesis.
    let fields: Vec<&str> =
        stat.rsplit_once(')').map(|(_, rest)| rest.split_whitespace().collect()).unwrap_or_default();
    // proc_pid_stat(5) counts from 1, and the first two are gone.
    let field = |number: usize| fields.get(number - 3)?.parse::<f64>().ok();
    if let Some((user, system)) = field(14).zip(field(15)) {
        let seconds = ConstCounter::new((user + system) / TICKS);
        registry.register("cpu_seconds", "User and system CPU time", seconds);
    }
    if let Some((boot, ticks)) = boot_time().zip(field(22)) {
        let seconds = ConstGauge::new(boot + ticks / TICKS);
        registry.register("start_time_seconds", "Start of the process, since the Unix epoch", seconds);
    }
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    for (key, name, help) in [
        ("VmRSS:", "resident_memory_bytes", "Resident memory"),
        ("VmSize:", "virtual_memory_bytes", "Virtual memory"),
    ] {
        if let Some(kib) = number_after(&status, key) {
            registry.register(name, help, ConstGauge::new(kib * KIB));
        }
    }
    if let Some(threads) = number_after(&status, "Threads:") {
        registry.register("threads", "Threads", ConstGauge::new(threads));
    }
    if let Ok(open) = fs::read_dir("/proc/self/fd") {
        // The directory itself is open while it is read.
        let open = i64::try_from(open.count()).unwrap_or(i64::MAX).saturating_sub(1);
        registry.register("open_fds", "Open file descriptors", ConstGauge::new(open));
    }
    let limits = fs::read_to_string("/proc/self/limits").unwrap_or_default();
    if let Some(max) = number_after(&limits, "Max open files") {
        registry.register("max_fds", "Most file descriptors that may be open", ConstGauge::new(max));
    }
    registry
}

/// The number that follows the key at the beginning of a line.
fn number_after(text: &str, key: &str) -> Option<i64> {
    let rest = text.lines().find_map(|line| line.strip_prefix(key))?;
    rest.split_whitespace().next()?.parse().ok()
}

/// Seconds since the Unix epoch.
fn boot_time() -> Option<f64> {
    let stat = fs::read_to_string("/proc/stat").ok()?;
    stat.lines().find_map(|line| line.strip_prefix("btime "))?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use super::super::Form;
    use super::super::text::encode;
    use super::*;

    #[test]
    fn the_process_is_described() {
        let text = encode(Form::OpenMetrics, &[&now()]).unwrap();
        let value = |name: &str| -> f64 {
            let line = text.lines().find_map(|line| line.strip_prefix(&format!("{name} ")));
            line.unwrap_or_else(|| panic!("{name}: {text}")).parse().unwrap()
        };
        assert!(value("process_resident_memory_bytes") > 1e6);
        assert!(value("process_open_fds") >= 3.0 && value("process_max_fds") > value("process_open_fds"));
        assert!(value("process_threads") >= 1.0 && value("process_cpu_seconds_total") >= 0.0);
        let since =
            SystemTime::UNIX_EPOCH.elapsed().unwrap().as_secs_f64() - value("process_start_time_seconds");
        assert!((-5.0..3600.0).contains(&since), "{since}");
    }
}
