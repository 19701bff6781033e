//! The script of one pod lifetime: everything in it is drawn from the seed.

use std::fmt;
use std::time::Duration;

use rand::rngs::Xoshiro256PlusPlus;
use rand::seq::{IndexedRandom as _, SliceRandom as _};
use rand::{RngExt as _, SeedableRng as _};

/// Time in which the faults begin, counted from the first.
const SPREAD: Duration = Duration::from_millis(2500);
/// Duration of a fault.
const SHORTEST: Duration = Duration::from_millis(200);
const LONGEST: Duration = Duration::from_millis(2500);
/// One lifetime in ten has longer faults, so that timers of the protocol expire.
const LONG: Duration = Duration::from_secs(8);
/// Number of faults in a lifetime.
const MOST: usize = 4;
/// Share of the lifetimes in which all faults are of the network: no stream may end in them.
const ONLY_NETWORK: f64 = 0.3;

/// Script of one lifetime.
#[derive(Clone, Debug, PartialEq)]
pub struct Script {
    /// Seed of the random generator.
    pub seed: u64,
    /// Path between worker node and VM.
    pub path: Path,
    /// Phase in which the faults hit.
    pub hit: Hit,
    /// The KBS speaks HTTPS.
    pub https: bool,
    /// An attacker connects to the agent all the time; over a TCP proxy only.
    pub attacker: bool,
    /// What the cloud writes into the VM's user data.
    pub user_data: UserData,
    /// Bytes of a request of the long-lived clients.
    pub request: u64,
    /// The faults, in the order in which they begin.
    pub faults: Vec<Planned>,
}

/// Path between worker node and VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Path {
    /// Loopback, through a [`TcpProxy`](crate::simulators::tcp_proxy::TcpProxy).
    Proxy,
    /// Two network namespaces, joined by an [`ImpairedLink`](crate::simulators::impaired_link::ImpairedLink).
    ImpairedLink,
}

/// Phase in which the faults hit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hit {
    /// From the start on: the KBS refuses the keys until the faults are over, so the pod stays in Attestation.
    Attestation(Duration),
    /// Once the pod is up.
    Kubernetes,
}

/// What the cloud writes into the VM's user data (apf.json). The VM's flags let it decide nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UserData {
    /// Nothing.
    Empty,
    /// Tunnels that lead to the attacker, in every phase, KATAAGENT among them.
    Tunnels,
    /// A tunnel to the attacker in the Kubernetes phase, and tunnels from and to unix sockets of the VM.
    UnixSockets,
    /// Keys of the attacker, with which he logs in.
    Keys,
    /// Values of the wrong types, and keys given twice.
    WrongTypes,
}

/// What a man in the middle answers in place of the KBS, with status 200.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Forgery {
    /// The attacker's worker-node key alone.
    WorkerNode,
    /// Both keys, of a pod of the attacker's.
    BothKeys,
    /// The keys that another pod of the same worker node once got.
    OtherPod,
    /// Keys that were cut off.
    Cut,
}

/// A fault and its time, counted from the first moment at which one may begin.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Planned {
    /// Time at which it begins.
    pub at: Duration,
    /// Its duration; for a killed process, the time until the next one starts.
    pub lasts: Duration,
    /// What it is.
    pub fault: Fault,
}

/// One of the two processes under test.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// In the VM.
    Agent,
    /// At the worker node.
    Adaptor,
}

/// A fault.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Fault {
    /// kill -9.
    Kill(Side),
    /// SIGABRT, with core dumps allowed, as a crash would end the process.
    Abort(Side),
    /// SIGSTOP, then SIGCONT.
    Freeze(Side),
    /// Killed, and started with a monotonic clock this many seconds ahead.
    Clock(Side, u32),
    /// The limit of file descriptors is what the process has open, plus a few.
    NoFiles(Side, u8),
    /// The VM reboots: the agent's state is gone.
    Reboot,
    /// The TCP connections are reset.
    Reset,
    /// All packets are dropped silently.
    Blackhole,
    /// Packets are lost, this many in a thousand.
    Loss(u16),
    /// Packets are delayed, by this many milliseconds.
    Delay(u16),
    /// Packets are reordered, this many in a thousand.
    Reorder(u16),
    /// Packets are duplicated, this many in a thousand.
    Duplicate(u16),
    /// The network device of the VM is down.
    LinkDown,
    /// The VM gets another address, and keeps it.
    Move,
    /// The KBS is down.
    KbsDown,
    /// Each answer of the KBS takes this many milliseconds.
    KbsSlow(u16),
    /// The KBS accepts connections and does not answer.
    KbsSilent,
    /// The KBS answers with bytes that are no key.
    KbsGarbage,
    /// A man in the middle answers the VM in place of the KBS. Over HTTPS he can only drop what is sent. If the VM could
    /// have taken his keys, it reboots afterwards.
    KbsForged(Forgery),
    /// The KBS closes every connection.
    KbsRefuses,
    /// The KBS answers 500.
    KbsBroken,
    /// The clock of the KBS is wrong by an hour.
    KbsClock(bool),
    /// `api-server-rest` is down.
    RestDown,
    /// The kata agent is down.
    KataDown,
    /// The adaptor's key store is full, and the adaptor is killed.
    StoreFull,
    /// The adaptor's key store is read-only, and the adaptor is killed.
    StoreReadOnly,
    /// The disk of the agent's latched keys is full, and the agent is killed.
    StateFull,
}

impl Script {
    /// Draws the script of one lifetime.
    #[must_use]
    pub fn draw(seed: u64) -> Self {
        let random = &mut Xoshiro256PlusPlus::seed_from_u64(seed);
        let path = if random.random_bool(0.5) { Path::ImpairedLink } else { Path::Proxy };
        let hit = if random.random_bool(0.5) {
            Hit::Attestation(between(random, Duration::from_millis(500), SPREAD))
        } else {
            Hit::Kubernetes
        };
        let (https, attacker) = (random.random_bool(0.25), random.random_bool(0.5));
        let request = [200, 8 * 1024, 256 * 1024].choose(random).copied().unwrap_or(200);
        let longest = if random.random_bool(0.1) { LONG } else { LONGEST };
        let mut possible = possible(random, path);
        if random.random_bool(ONLY_NETWORK) {
            possible.retain(|fault| fault.is_of_the_network());
        }
        possible.shuffle(random);
        possible.truncate(random.random_range(1..=MOST));
        // A read-only disk can't be filled.
        if possible.contains(&Fault::StoreReadOnly) {
            possible.retain(|fault| *fault != Fault::StoreFull);
        }
        let mut faults: Vec<_> = possible
            .into_iter()
            .map(|fault| Planned {
                at: between(random, Duration::ZERO, SPREAD),
                lasts: between(random, SHORTEST, longest),
                fault,
            })
            .collect();
        faults.sort_by_key(|planned| planned.at);
        let user_data = if random.random_bool(0.5) { hostile(random) } else { UserData::Empty };
        Self { seed, path, hit, https, attacker: attacker && path == Path::Proxy, user_data, request, faults }
    }

    /// Whether one of the faults satisfies `wanted`.
    pub fn has(&self, wanted: impl Fn(&Fault) -> bool) -> bool {
        self.faults.iter().any(|planned| wanted(&planned.fault))
    }
}

fn hostile(random: &mut Xoshiro256PlusPlus) -> UserData {
    let all = [UserData::Tunnels, UserData::UnixSockets, UserData::Keys, UserData::WrongTypes];
    all.choose(random).copied().unwrap_or(UserData::Keys)
}

impl Script {
    /// Time of the first fault that may end streams, counted as in [`Planned`]; none if no stream may end. Before the pod
    /// is up there is no session that could keep one.
    #[must_use]
    pub fn spares_streams_until(&self) -> Option<Duration> {
        match self.hit {
            Hit::Attestation(_) => Some(Duration::ZERO),
            Hit::Kubernetes => {
                self.faults.iter().find(|planned| !planned.fault.spares_streams()).map(|planned| planned.at)
            }
        }
    }
}

impl Fault {
    /// Whether it is one of the path between worker node and VM.
    #[must_use]
    pub fn is_of_the_network(&self) -> bool {
        matches!(
            self,
            Self::Reset
                | Self::Blackhole
                | Self::Loss(_)
                | Self::Delay(_)
                | Self::Reorder(_)
                | Self::Duplicate(_)
                | Self::LinkDown
                | Self::Move
        )
    }

    /// Whether no stream of the Kubernetes phase may end by it: both processes and the servers of the tunnels go on.
    #[must_use]
    pub fn spares_streams(&self) -> bool {
        match self {
            // The VM reboots after some of the forgeries, and a process without file descriptors opens no stream.
            Self::Kill(_) | Self::Abort(_) | Self::Clock(..) | Self::NoFiles(..) | Self::Reboot => false,
            Self::KbsForged(_) | Self::KataDown => false,
            Self::StoreFull | Self::StoreReadOnly | Self::StateFull => false,
            Self::Freeze(_) | Self::RestDown => true,
            Self::KbsDown | Self::KbsSlow(_) | Self::KbsSilent | Self::KbsGarbage => true,
            Self::KbsRefuses | Self::KbsBroken | Self::KbsClock(_) => true,
            network => network.is_of_the_network(),
        }
    }
}

/// Every fault that is possible on a path, each once, with its numbers drawn.
fn possible(random: &mut Xoshiro256PlusPlus, path: Path) -> Vec<Fault> {
    let mut all = vec![Fault::Reboot, Fault::Reset, Fault::Blackhole];
    for side in [Side::Agent, Side::Adaptor] {
        // Ahead only: a monotonic clock can't be before the boot.
        let seconds = random.random_range(3600..1_000_000);
        all.extend([Fault::Kill(side), Fault::Abort(side), Fault::Freeze(side), Fault::Clock(side, seconds)]);
        all.push(Fault::NoFiles(side, random.random_range(0..4)));
    }
    all.extend([Fault::KbsDown, Fault::KbsSlow(random.random_range(100..2000)), Fault::KbsSilent]);
    all.extend([Fault::KbsGarbage, Fault::KbsRefuses, Fault::KbsBroken]);
    all.push(Fault::KbsClock(random.random_bool(0.5)));
    let forgeries = [Forgery::WorkerNode, Forgery::BothKeys, Forgery::OtherPod, Forgery::Cut];
    all.extend(forgeries.map(Fault::KbsForged));
    all.extend([Fault::RestDown, Fault::KataDown]);
    all.extend([Fault::StoreFull, Fault::StoreReadOnly, Fault::StateFull]);
    let lossy = [random.random_range(5..200), random.random_range(10..300), random.random_range(10..300)];
    let late = random.random_range(5..150);
    if path == Path::ImpairedLink {
        let [loss, reorder, twice] = lossy;
        all.extend([Fault::Loss(loss), Fault::Delay(late), Fault::Reorder(reorder), Fault::Duplicate(twice)]);
        all.extend([Fault::LinkDown, Fault::Move]);
    }
    all
}

fn between(random: &mut Xoshiro256PlusPlus, least: Duration, most: Duration) -> Duration {
    let [least, most] = [least, most].map(|time| u64::try_from(time.as_millis()).unwrap_or(u64::MAX));
    Duration::from_millis(random.random_range(least..=most))
}

impl fmt::Display for Script {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let path = if self.path == Path::Proxy { "proxy" } else { "link" };
        write!(f, "{path}")?;
        match self.hit {
            Hit::Attestation(held) => write!(f, ", Attestation held {:.1} s", held.as_secs_f64())?,
            Hit::Kubernetes => f.write_str(", Kubernetes")?,
        }
        for (wanted, word) in [(self.https, "https"), (self.attacker, "attacker")] {
            if wanted {
                write!(f, ", {word}")?;
            }
        }
        if self.user_data != UserData::Empty {
            write!(f, ", user data {:?}", self.user_data)?;
        }
        write!(f, ", {} B:", self.request)?;
        for Planned { at, lasts, fault } in &self.faults {
            write!(f, " {:.1}+{:.1} {fault:?};", at.as_secs_f64(), lasts.as_secs_f64())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn a_seed_gives_the_same_life_each_time() {
        for seed in 0..200 {
            assert_eq!(Script::draw(seed), Script::draw(seed));
        }
    }

    #[test]
    fn every_kind_of_user_data_meets_an_attacker() {
        let scripts = (0..200).map(Script::draw).filter(|script| script.attacker);
        let kinds: HashSet<_> = scripts.map(|script| format!("{:?}", script.user_data)).collect();
        assert_eq!(kinds.len(), 5, "{kinds:?}");
    }

    #[test]
    fn only_a_fault_that_ends_a_process_or_a_server_excuses_the_end_of_a_stream() {
        let second = Duration::from_secs(1);
        let planned = |at: Duration, fault| Planned { at, lasts: second, fault };
        let mut script = Script::draw(1);
        script.hit = Hit::Kubernetes;
        script.faults = vec![planned(second, Fault::Reset), planned(2 * second, Fault::Freeze(Side::Agent))];
        assert_eq!(script.spares_streams_until(), None);
        script.faults.push(planned(3 * second, Fault::Kill(Side::Adaptor)));
        assert_eq!(script.spares_streams_until(), Some(3 * second));
        script.hit = Hit::Attestation(second);
        assert_eq!(script.spares_streams_until(), Some(Duration::ZERO));
    }

    #[test]
    fn many_lifetimes_have_faults_of_the_network_only() {
        let only = (0..300).map(Script::draw).filter(|script| script.spares_streams_until().is_none());
        assert!(only.count() > 30);
    }

    #[test]
    fn in_a_few_hundred_lifetimes_every_fault_hits_each_phase() {
        let (mut attestation, mut kubernetes) = (HashSet::new(), HashSet::new());
        for script in (0..600).map(Script::draw) {
            let seen = if script.hit == Hit::Kubernetes { &mut kubernetes } else { &mut attestation };
            for planned in &script.faults {
                let words = format!("{:?}", planned.fault);
                let name = match planned.fault {
                    Fault::Clock(side, _) => format!("clock {side:?}"),
                    Fault::NoFiles(side, _) => format!("files {side:?}"),
                    Fault::Kill(_) | Fault::Abort(_) | Fault::Freeze(_) | Fault::KbsForged(_) => words,
                    _ => words.split('(').next().unwrap().to_owned(),
                };
                seen.insert(name);
            }
            assert!(!script.faults.is_empty());
        }
        // 27 kinds, five of which exist for either side, and one in four forms.
        assert_eq!((attestation.len(), kubernetes.len()), (35, 35), "{attestation:?}");
    }
}
