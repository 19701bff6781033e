//! Our nftables rules, which send the dials of cloud-api-adaptor to us: they are put in place, watched, and put back.
//!
//! In: the two ports. Out: the table `inet secure-comms-adaptor` in the network namespace of the process, and whether it is
//! there ([`Health`], part `rules`). The table is replaced in one transaction only, and stays when the process ends.
//!
//! Two chains: `to-adaptor` redirects a dial of the node to the VMs' port, wherever it goes, to our port on the loopback
//! address. `fence` rejects what was not redirected: it would reach the cloud, where anyone could answer.
//!
//! `fence` also drops what we send while the kernel has lost the translation of a connection (`conntrack -F`). The dialler
//! does not know our own address and would reset the connection. Its next packet makes the translation again; TCP repeats
//! what was dropped.

mod changes;
mod listing;
mod nft;

use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout_at};

use self::changes::Changes;
use self::listing::Listing;
pub use self::nft::NftError;
use crate::health::Health;
use crate::metrics::Metrics;

/// The table, of family `inet`.
pub const TABLE: &str = "secure-comms-adaptor";
/// The name of the part in [`Health`].
pub const PART: &str = "rules";
/// How often the rules are looked at even if no change was announced: an announcement may be lost.
const LOOK: Duration = Duration::from_secs(15);
/// The pause before the next try after a failure.
const RETRY: Duration = Duration::from_secs(5);
/// The shortest time between two repairs, and the longest while another program changes the rules again and again: it gets
/// no busy loop.
const REPAIRS: [Duration; 2] = [Duration::from_millis(100), Duration::from_millis(500)];
/// How many repairs in a row have a line in the log each. The others are counted.
const REPAIRS_SAID: u32 = 5;

/// What [`Health`] says while the rules do not stay.
const CHANGED_AGAIN: &str =
    "another program changes them again and again: nft monitor shows the changes, and what makes them";

/// The ports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RulesSettings {
    /// The port of the VMs that cloud-api-adaptor dials.
    pub forwarder_port: u16,
    /// Our port on the loopback addresses.
    pub listen_port: u16,
}

/// What is in place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RulesState {
    /// Our table is not there.
    Missing,
    /// All is as it should be.
    InPlace {
        /// Packets that the fence has rejected: dials that were not redirected.
        fenced: u64,
    },
    /// The table is there, and differs.
    Different {
        /// The first difference.
        what: String,
    },
}

/// The rules, as nft reads them: the table is made if it is missing, deleted and made again, in one transaction.
fn script(settings: RulesSettings) -> String {
    let RulesSettings { forwarder_port, listen_port } = settings;
    let dials = [("ip", "127.0.0.0/8"), ("ip6", "::1")]
        .map(|(family, own)| format!("{family} daddr != {own} tcp dport {forwarder_port}"));
    let rules = |verdict: &str| dials.each_ref().map(|dial| format!("    {dial} {verdict}\n")).concat();
    let untranslated = [("ip", "127.0.0.0/8"), ("ip6", "::1")]
        .map(|(family, own)| format!("    {family} saddr {own} tcp sport {listen_port} ct state new drop\n"));
    format!(
        "table inet {TABLE}\n\
         delete table inet {TABLE}\n\
         table inet {TABLE} {{\n  \
           chain to-adaptor {{\n    type nat hook output priority -100; policy accept;\n{}  }}\n  \
           chain fence {{\n    type filter hook output priority 0; policy accept;\n{}{}  }}\n\
         }}\n",
        rules(&format!("redirect to :{listen_port}")),
        rules("counter reject with tcp reset"),
        untranslated.concat(),
    )
}

/// Replaces our table in one transaction.
///
/// # Errors
/// nft is not there, or may not change the rules.
pub async fn apply(settings: RulesSettings) -> Result<(), NftError> {
    nft::run(&["-f", "-"], &script(settings)).await.map(drop)
}

/// The port to which the rules in place redirect dials; `None`: there are none, or they are not ours.
///
/// # Errors
/// As [`apply`].
pub async fn redirected_to() -> Result<Option<u16>, NftError> {
    Ok(listing().await?.and_then(|listing| listing.redirects_to()))
}

/// Deletes our table; false if there was none.
///
/// Without it a dial of cloud-api-adaptor reaches the VM's address itself: no pod can start over Secure Comms. On a node
/// that has no other nat chain for output, the streams of running pods break with their next packet.
///
/// # Errors
/// As [`apply`].
pub async fn remove() -> Result<bool, NftError> {
    if nft::list().await?.is_none() {
        return Ok(false);
    }
    nft::run(&["-f", "-"], &format!("delete table inet {TABLE}\n")).await.map(|_| true)
}

/// What is in place now.
///
/// # Errors
/// As [`apply`].
pub async fn inspect(settings: RulesSettings) -> Result<RulesState, NftError> {
    let Some(listing) = listing().await? else { return Ok(RulesState::Missing) };
    let expected = Listing::expected(settings);
    Ok(match listing.difference(&expected) {
        None => RulesState::InPlace { fenced: listing.fenced },
        Some(what) => RulesState::Different { what },
    })
}

async fn listing() -> Result<Option<Listing>, NftError> {
    nft::list().await?.map(|json| Listing::parse(&json)).transpose()
}

/// Puts the rules in place and keeps them there until `stop`; then they stay. A failure is retried every 5 s.
///
/// # Cancellation
/// Dropping the future leaves the rules as they are.
pub async fn keep(
    settings: RulesSettings,
    health: Health,
    metrics: Metrics,
    mut stop: watch::Receiver<bool>,
) {
    let mut keeper = Keeper {
        settings,
        health,
        metrics,
        applied: None,
        made: false,
        repairs: 0,
        repaired_at: None,
        fault: None,
    };
    tokio::select! {
        biased;
        // The sender is gone: the process ends.
        _ = stop.wait_for(|stop| *stop) => {}
        () = keeper.run() => {}
    }
}

struct Keeper {
    settings: RulesSettings,
    health: Health,
    metrics: Metrics,
    /// The listing right after our last change: a version of nft may show rules in another form than we expect.
    applied: Option<Listing>,
    /// Whether they were in place.
    made: bool,
    /// How many repairs there were, each soon after the one before, and when the last was.
    repairs: u32,
    repaired_at: Option<Instant>,
    /// The fault that was logged, until it has passed.
    fault: Option<String>,
}

impl Keeper {
    async fn run(&mut self) {
        loop {
            // Before the first look, so that no change is missed.
            let changes = Changes::subscribe();
            if let Err(error) = &changes {
                tracing::warn!(
                    "rules: changes cannot be watched: {error}: they are looked at every {} s",
                    LOOK.as_secs()
                );
            }
            let mut changes = changes.ok();
            let Err(error) = self.watch(&mut changes).await;
            self.failed(error.to_string());
            sleep(RETRY).await;
        }
    }

    /// One that repeats is logged once.
    fn failed(&mut self, fault: String) {
        self.health.fails(PART, fault.clone());
        if self.fault.as_ref() != Some(&fault) {
            tracing::error!("rules: {fault}; retrying every {} s", RETRY.as_secs());
        }
        self.fault = Some(fault);
    }

    async fn watch(&mut self, changes: &mut Option<Changes>) -> Result<std::convert::Infallible, NftError> {
        loop {
            let next_look = Instant::now() + LOOK;
            self.look().await?;
            let Some(changes) = changes else {
                sleep(LOOK).await;
                continue;
            };
            if let Ok(Err(error)) = timeout_at(next_look, changes.next()).await {
                // The next subscription follows a pause.
                return Err(NftError::Watch(error));
            }
        }
    }

    /// Puts the rules back if they are not as they should be.
    async fn look(&mut self) -> Result<(), NftError> {
        let (found, difference) = match listing().await {
            Ok(found) => {
                let difference = self.difference(found.as_ref());
                (found, difference)
            }
            // nft 1.0.6 prints a part only of a table that is dormant, and succeeds.
            Err(NftError::Output(fault)) => (None, Some(format!("their listing cannot be read: {fault}"))),
            Err(error) => return Err(error),
        };
        let Some(difference) = difference else {
            self.find(found);
            return Ok(());
        };
        apply(self.settings).await?;
        // Another program may have changed them in between: its rules are not taken for ours, but looked at again.
        self.applied = listing().await?.filter(|made| made.can_be_ours(self.settings));
        if self.made {
            self.repaired(&difference).await;
        } else {
            tracing::info!(
                "rules: table inet {TABLE}: dials to port {} are redirected to port {}",
                self.settings.forwarder_port,
                self.settings.listen_port
            );
            self.made = true;
        }
        match self.applied {
            Some(_) => self.works(),
            None => self.health.fails(PART, CHANGED_AGAIN),
        }
        Ok(())
    }

    fn difference(&self, found: Option<&Listing>) -> Option<String> {
        match (&self.applied, found) {
            (Some(applied), Some(found)) => found.difference(applied),
            (None, Some(found)) => found.difference(&Listing::expected(self.settings)),
            (_, None) => Some("they are not there".to_owned()),
        }
    }

    /// They are as they should be.
    fn find(&mut self, found: Option<Listing>) {
        if !self.made {
            tracing::info!("rules: table inet {TABLE}: in place already");
            self.made = true;
        }
        // Our own change is announced as well: that they are in place right after it says nothing yet.
        if self.repaired_at.is_some_and(|repaired| repaired.elapsed() >= LOOK) {
            let more = self.repairs.saturating_sub(REPAIRS_SAID);
            if more > 0 {
                tracing::warn!("rules: table inet {TABLE}: put back {more} more times, and in place now");
            }
            (self.repairs, self.repaired_at) = (0, None);
        }
        if self.applied.is_none() {
            self.applied = found;
        }
        self.works();
    }

    fn works(&mut self) {
        if self.fault.take().is_some() {
            tracing::info!("rules: table inet {TABLE}: in place again");
        }
        self.health.works(PART);
    }

    /// Counts and reports a repair, and pauses.
    async fn repaired(&mut self, difference: &str) {
        self.metrics.rules_put_back();
        self.repairs = self.repairs.saturating_add(1);
        self.repaired_at = Some(Instant::now());
        if self.repairs <= REPAIRS_SAID {
            let last = if self.repairs == REPAIRS_SAID { "; further repairs are counted" } else { "" };
            tracing::warn!(
                "rules: table inet {TABLE}: put back: {difference}: another program has changed them; streams of pods may have \
                 ended{last}"
            );
        }
        let [first, longest] = REPAIRS;
        sleep(longest.min(first * self.repairs)).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_script_replaces_the_table_in_one_transaction() {
        let script = script(RulesSettings { forwarder_port: 15150, listen_port: 15151 });
        let lines: Vec<&str> = script.lines().map(str::trim).collect();
        assert_eq!(lines[..2], ["table inet secure-comms-adaptor", "delete table inet secure-comms-adaptor"]);
        for rule in [
            "ip daddr != 127.0.0.0/8 tcp dport 15150 redirect to :15151",
            "ip6 daddr != ::1 tcp dport 15150 redirect to :15151",
            "ip daddr != 127.0.0.0/8 tcp dport 15150 counter reject with tcp reset",
            "ip6 daddr != ::1 tcp dport 15150 counter reject with tcp reset",
            "ip saddr 127.0.0.0/8 tcp sport 15151 ct state new drop",
            "ip6 saddr ::1 tcp sport 15151 ct state new drop",
        ] {
            assert!(lines.contains(&rule), "{rule}\n{script}");
        }
    }
}
