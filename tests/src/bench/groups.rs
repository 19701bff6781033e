//! Groups of measurements: one table and one picture each, and their goals.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result};

use super::contender::{Contender, Prepared, Who};
use super::load::{self, Span};
use super::measure::{self, Figures};
use super::place::Place;
use crate::simulators::impaired_link::{ImpairedLink, Impairment};

/// One measurement of a group.
#[derive(Clone, Copy, Debug)]
pub struct Row {
    /// Its key in `Figures`.
    pub key: &'static str,
    /// Its name in the table.
    pub name: &'static str,
    /// The unit of its figures.
    pub unit: &'static str,
    /// Goal for the ratio, ours to OpenSSH's.
    pub goal: Goal,
}

/// Goal for a ratio.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Goal {
    /// At least this.
    Least(f64),
    /// At most this.
    Most(f64),
    /// No goal; higher is better.
    MoreIsBetter,
    /// No goal; lower is better.
    LessIsBetter,
}

impl Goal {
    /// Whether a ratio reaches the goal; `None` without a goal.
    #[must_use]
    pub fn reached(self, ratio: f64) -> Option<bool> {
        match self {
            Self::Least(least) => Some(ratio >= least),
            Self::Most(most) => Some(ratio <= most),
            Self::MoreIsBetter | Self::LessIsBetter => None,
        }
    }
}

/// A group.
#[derive(Clone, Copy, Debug)]
pub struct Group {
    /// Name on the command line, and of its picture's file.
    pub name: &'static str,
    /// Its heading.
    pub title: &'static str,
    /// Its measurements.
    pub rows: &'static [Row],
    kind: Kind,
}

#[derive(Clone, Copy, Debug)]
enum Kind {
    Bulk,
    Latency,
    Setup,
    Memory,
    /// A link: its round trip in milliseconds, and its loss in packets of a thousand.
    Distance(u64, u32),
}

/// Seed of the link: the same packets are lost in every run that sends the same packets.
const SEED: u64 = 5;

const fn row(key: &'static str, name: &'static str, unit: &'static str, goal: Goal) -> Row {
    Row { key, name, unit, goal }
}

const BULK: &[Row] = &[
    row("up 1", "one stream, to the VM", "MiB/s", Goal::Least(1.0)),
    row("down 1", "one stream, from the VM", "MiB/s", Goal::Least(1.0)),
    row("up 16", "16 streams, to the VM", "MiB/s", Goal::Least(1.2)),
    row("down 16", "16 streams, from the VM", "MiB/s", Goal::Least(1.2)),
    row("both 16", "16 streams, both ways at once", "MiB/s", Goal::MoreIsBetter),
    row("up vm cpu", "CPU in the VM, receiving", "s/GiB", Goal::Most(0.85)),
    row("up node cpu", "CPU on the worker node, sending", "s/GiB", Goal::Most(0.85)),
    row("down vm cpu", "CPU in the VM, sending", "s/GiB", Goal::Most(0.85)),
    row("down node cpu", "CPU on the worker node, receiving", "s/GiB", Goal::Most(0.85)),
];

const LATENCY: &[Row] = &[
    row("alone p50", "alone, p50", "us", Goal::Most(1.0)),
    row("alone p99", "alone, p99", "us", Goal::Most(0.5)),
    row("with up p50", "with a stream to the VM, p50", "us", Goal::Most(1.0)),
    row("with up p99", "with a stream to the VM, p99", "us", Goal::Most(0.5)),
    row("with down p50", "with a stream from the VM, p50", "us", Goal::Most(1.0)),
    row("with down p99", "with a stream from the VM, p99", "us", Goal::Most(0.5)),
    row(
        "kata with up p50",
        "at KATAAGENT, with a stream to the VM in another tunnel, p50",
        "us",
        Goal::Most(0.5),
    ),
    row(
        "kata with up p99",
        "at KATAAGENT, with a stream to the VM in another tunnel, p99",
        "us",
        Goal::Most(0.2),
    ),
    row(
        "kata with down p50",
        "at KATAAGENT, with a stream from the VM in another tunnel, p50",
        "us",
        Goal::Most(0.5),
    ),
    row(
        "kata with down p99",
        "at KATAAGENT, with a stream from the VM in another tunnel, p99",
        "us",
        Goal::Most(0.2),
    ),
    row("stalled p50", "with a stalled reader, p50", "us", Goal::LessIsBetter),
    row("stalled p99", "with a stalled reader, p99", "us", Goal::LessIsBetter),
];

const SETUP: &[Row] = &[
    row("process", "process start to first byte", "ms", Goal::Most(0.1)),
    row("connect", "TCP connect to first byte", "ms", Goal::Most(0.1)),
    row("stream", "a further stream to its first byte", "ms", Goal::LessIsBetter),
];

const MEMORY: &[Row] = &[
    row("vm connected", "in the VM, connected", "KiB", Goal::Most(0.3)),
    row("vm 300", "in the VM, 300 streams", "KiB", Goal::Most(0.5)),
    row("vm peak", "in the VM, peak of 16 streams both ways", "KiB", Goal::Most(0.15)),
    row("node connected", "on the worker node, connected", "KiB", Goal::LessIsBetter),
    row("node 300", "on the worker node, 300 streams", "KiB", Goal::LessIsBetter),
    row("node peak", "on the worker node, peak of 16 streams both ways", "KiB", Goal::LessIsBetter),
];

const NEAR: &[Row] = &[
    row("up 1", "one stream, to the VM", "MiB/s", Goal::MoreIsBetter),
    row("down 1", "one stream, from the VM", "MiB/s", Goal::MoreIsBetter),
    row("p50", "200 bytes, p50", "us", Goal::LessIsBetter),
    row("p99", "200 bytes, p99", "us", Goal::LessIsBetter),
];

const FAR: &[Row] = &[
    row("up 1", "one stream, to the VM", "MiB/s", Goal::Least(3.0)),
    row("down 1", "one stream, from the VM", "MiB/s", Goal::Least(3.0)),
    row("p50", "200 bytes, p50", "us", Goal::LessIsBetter),
    row("p99", "200 bytes, p99", "us", Goal::LessIsBetter),
];

/// All groups.
pub const GROUPS: [Group; 8] = [
    Group { name: "bulk", title: "Bulk data, loopback", rows: BULK, kind: Kind::Bulk },
    Group {
        name: "latency",
        title: "Requests and answers of 200 bytes, loopback",
        rows: LATENCY,
        kind: Kind::Latency,
    },
    Group { name: "setup", title: "Until the first byte, loopback", rows: SETUP, kind: Kind::Setup },
    Group { name: "memory", title: "Resident memory", rows: MEMORY, kind: Kind::Memory },
    Group { name: "rtt-20", title: "Round trip of 20 ms", rows: NEAR, kind: Kind::Distance(20, 0) },
    Group { name: "rtt-80", title: "Round trip of 80 ms", rows: FAR, kind: Kind::Distance(80, 0) },
    Group { name: "loss", title: "1 % loss each way", rows: NEAR, kind: Kind::Distance(0, 10) },
    Group {
        name: "rtt-20-loss",
        title: "Round trip of 20 ms, 1 % loss each way",
        rows: NEAR,
        kind: Kind::Distance(20, 10),
    },
];

/// Amounts of a run.
#[derive(Clone, Copy, Debug)]
pub struct Amount {
    /// Rounds.
    pub rounds: usize,
    /// Duration of each bulk measurement.
    pub counted: Duration,
    /// Requests of each latency measurement.
    pub requests: u64,
}

/// Figures of both contenders in one round.
#[derive(Debug)]
pub struct Round {
    /// Ours.
    pub ours: Figures,
    /// OpenSSH's.
    pub openssh: Figures,
}

impl Group {
    /// Measures both contenders, alternating.
    ///
    /// # Errors
    /// If a contender does not come up, or delivers a wrong byte.
    pub async fn run(&self, amount: Amount) -> Result<Vec<Round>> {
        let place = match self.kind {
            Kind::Distance(rtt, loss) => {
                let line = Impairment {
                    loss: f64::from(loss) / 1000.0,
                    ..Impairment::round_trip(Duration::from_millis(rtt))
                };
                Place::Apart(Box::new(ImpairedLink::new(SEED, line).await?))
            }
            _ => Place::Here,
        };
        let listener = place.listen_in_vm().await?;
        let target = listener.local_addr()?;
        load::serve(listener);
        let both = match self.kind {
            // These measurements need fresh processes in each round.
            Kind::Setup | Kind::Memory => None,
            _ => Some((
                connected(Who::Ours, &place, target).await?,
                connected(Who::OpenSsh, &place, target).await?,
            )),
        };
        let mut rounds = Vec::new();
        for round in 0..amount.rounds {
            // The contender that goes first in this round goes second in the next.
            let mut order = [Who::Ours, Who::OpenSsh];
            order.rotate_left(round % 2);
            let (mut ours, mut openssh) = (Figures::new(), Figures::new());
            for who in order {
                let contender =
                    both.as_ref().map(|(ours, openssh)| if who == Who::Ours { ours } else { openssh });
                let figures = self.measure(who, contender, &place, target, amount).await;
                let figures =
                    figures.with_context(|| format!("{}, {who:?}, round {}", self.name, round + 1))?;
                *(if who == Who::Ours { &mut ours } else { &mut openssh }) = figures;
            }
            rounds.push(Round { ours, openssh });
        }
        Ok(rounds)
    }

    async fn measure(
        &self,
        who: Who,
        contender: Option<&Contender>,
        place: &Place,
        target: SocketAddr,
        amount: Amount,
    ) -> Result<Figures> {
        let there = || contender.context("no contender is connected");
        let short = Span { warm_up: Duration::from_millis(200), counted: amount.counted };
        match self.kind {
            Kind::Bulk => measure::bulk(place, there()?, short).await,
            Kind::Latency => measure::latency(place, there()?, amount.requests).await,
            Kind::Setup => measure::setup(who, target).await,
            Kind::Memory => measure::memory(who, target, short).await,
            Kind::Distance(rtt, _) => {
                // Windows grow with the round trip, and so do TCP's buffers.
                let span =
                    Span { warm_up: Duration::from_millis(200 + 50 * rtt), counted: amount.counted * 3 };
                measure::distance(place, there()?, span, (amount.requests / (1 + rtt)).max(100)).await
            }
        }
    }
}

async fn connected(who: Who, place: &Place, target: SocketAddr) -> Result<Contender> {
    let prepared = Prepared::new(who, place, target).await?;
    let ssh = prepared.ssh();
    Ok(prepared.connect(place, ssh).await?.0)
}
