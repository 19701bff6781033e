//! The status subsystem: one JSON object about this agent, for a proven peer. It changes nothing.

use std::time::Duration;

use bytes::Bytes;
use secure_comms_keys::text::one_line;
use secure_comms_protocol::limits::{
    LOG_KEPT, MESSAGE_MAX, PROBE, STATUS_MAX, STATUS_TIME, STATUS_TUNNELS_MAX,
};
use secure_comms_protocol::{Banner, LoginState, Phase, PhaseName, TunnelName};
use secure_comms_tunnel::{Event, Receiver, Sender};
use serde_json::{Value, json};
use tokio::task::JoinSet;
use tokio::time::timeout;

use crate::agent::Agent;
use crate::os::operator_log::{level_name, operator_log};
use crate::peers::link::{PeerReceiver, PeerSender};
use crate::peers::peer::{Peer, Peers};
use crate::peers::sessions::{AdaptorSession, LaneConnection};

/// Longest target, address or error in a report, in bytes.
const TEXT_MAX: usize = 200;
/// Peers in a report. Those that are about to close may be more.
const PEERS_MAX: usize = 32;

/// Sends the report and ends the channel with exit status 0. Ends the connection if the report is not read within
/// [`STATUS_TIME`].
pub(super) async fn serve<P: Phase>(
    agent: &Agent,
    peer: &Peer<P>,
    mut receiver: PeerReceiver,
    sender: PeerSender,
) {
    let answer = async {
        // Each report connects to every target: two at a time are enough for people.
        let _permit = agent.limits.reports.acquire().await;
        let report = report(agent).await;
        send(&sender, Bytes::from(report)).await;
    };
    // The channel is emptied all the time, or it would stall the SSH session.
    let discard = async { while !matches!(receiver.recv().await, None | Some(Event::Close)) {} };
    let answered = async {
        if timeout(STATUS_TIME, answer).await.is_err() {
            peer.connection.end("the status was not read in time");
        }
        std::future::pending().await
    };
    tokio::select! {
        () = answered => {}
        () = discard => {}
        () = peer.credits.gone() => {}
    }
}

/// Sends the text and ends the channel. An error means that the reader is gone.
async fn send(sender: &PeerSender, mut text: Bytes) {
    while !text.is_empty() {
        if sender.send(text.split_to(text.len().min(MESSAGE_MAX))).await.is_err() {
            return;
        }
    }
    if sender.eof().await.is_ok() && sender.exit_status(0).await.is_ok() {
        // The reader may be gone by now, and has everything.
        let _ = sender.close().await;
    }
}

/// One JSON object and a newline, at most [`STATUS_MAX`] bytes.
async fn report(agent: &Agent) -> String {
    let (phase, login) = match agent.policy.banner() {
        Banner::Attestation => (PhaseName::Attestation, None),
        Banner::Kubernetes(LoginState::Fresh) => (PhaseName::Kubernetes, Some("fresh")),
        Banner::Kubernetes(LoginState::Latched) => (PhaseName::Kubernetes, Some("latched")),
    };
    let adaptor = agent.peers.kubernetes.adaptor();
    let pod = agent.pod().or_else(|| adaptor.as_ref().and_then(|adaptor| adaptor.pod.get().cloned()));
    let mut peers = peers(&agent.peers.kubernetes);
    peers.extend(self::peers(&agent.peers.attestation));
    peers.truncate(PEERS_MAX);
    let session = agent.sessions.current();
    let of_session = session.as_ref().map_or(0, |session| session.streams.credits().open_streams());
    let streams = open_streams(&agent.peers.kubernetes) + open_streams(&agent.peers.attestation) + of_session;
    let report = json!({
        "version": env!("CARGO_PKG_VERSION"),
        "instance": agent.instance,
        "uptime_s": agent.started.elapsed().as_secs(),
        "phase": phase.user(),
        "login": login,
        "pod": pod.map(|pod| pod.to_string()),
        "peers": peers,
        "streams": streams,
        "session": session.as_deref().map(describe_session),
        "inbounds": inbounds(agent),
        "outbounds": outbounds(agent).await,
        "keys": keys(agent),
        "init_data": agent.announced.init_data.as_ref().map(ToString::to_string),
        "config": config(agent),
        "pod_network": agent.pod_network_state().map(|state| one_line(&state, TEXT_MAX)),
    });
    bounded(report, log_lines())
}

/// Adds the newest lines that fit.
fn bounded(mut report: Value, mut lines: Vec<Value>) -> String {
    loop {
        if let Some(object) = report.as_object_mut() {
            object.insert("log".into(), lines.clone().into());
        }
        let mut text = report.to_string();
        if text.len() < STATUS_MAX || lines.is_empty() {
            text.push('\n');
            return text;
        }
        lines.drain(..lines.len().div_ceil(4));
    }
}

fn open_streams<P: Phase>(peers: &Peers<P>) -> usize {
    peers.all().iter().map(|peer| peer.credits.open_streams()).sum()
}

fn peers<P: Phase>(peers: &Peers<P>) -> Vec<Value> {
    let describe = |peer: &Peer<P>| {
        json!({
            "address": peer.connection.address.to_string(),
            "phase": P::NAME.user(),
            "role": match P::NAME {
                _ if peer.is_closing() => "closing",
                PhaseName::Kubernetes if peer.is_adaptor() => "adaptor",
                PhaseName::Kubernetes => "guest",
                PhaseName::Attestation => "unproven",
            },
            "pod": peer.pod.get().map(ToString::to_string),
            "connected_s": seconds(peer.since.elapsed()),
            "streams": peer.credits.open_streams(),
        })
    };
    // The adaptor first, so that it is never among those that are left out.
    let mut all = peers.all();
    all.sort_by_key(|peer| (!peer.is_adaptor(), peer.is_closing()));
    all.iter().take(PEERS_MAX).map(|peer| describe(peer)).collect()
}

fn describe_session(session: &AdaptorSession) -> Value {
    let lanes: Vec<_> = session
        .connected()
        .iter()
        .map(|(lane, LaneConnection { peer, since, .. })| {
            json!({
                "name": lane.name(),
                "address": peer.connection.address.to_string(),
                "connected_s": seconds(since.elapsed()),
            })
        })
        .collect();
    json!({
        "lanes": lanes,
        "streams": session.streams.credits().open_streams(),
        "resumed": session.resumed(),
        "waiting_s": session.alone_since().map(|since| seconds(since.elapsed())),
    })
}

fn seconds(duration: Duration) -> u64 {
    duration.as_secs()
}

fn inbounds(agent: &Agent) -> Vec<Value> {
    let (session, serving) = (agent.sessions.current(), agent.peers.kubernetes.serving());
    let is_served = |name: &TunnelName| match &session {
        Some(session) => session.offers(name),
        None => serving.as_ref().is_some_and(|peer| peer.offers(name)),
    };
    let describe = |tag: &secure_comms_protocol::InboundTag| {
        json!({
            "name": tag.name.to_string(),
            "tag": one_line(&tag.to_string(), TEXT_MAX),
            "served": is_served(&tag.name),
        })
    };
    agent.tunnels.routes.tags(PhaseName::Kubernetes).take(STATUS_TUNNELS_MAX).map(describe).collect()
}

/// The targets of the Kubernetes phase, and whether each accepts a connection within [`PROBE`].
async fn outbounds(agent: &Agent) -> Vec<Value> {
    let mut names = agent.tunnels.kubernetes.names();
    names.sort();
    let mut probes = JoinSet::new();
    for (index, name) in names.into_iter().take(STATUS_TUNNELS_MAX).enumerate() {
        let Ok(permit) = agent.tunnels.kubernetes.permit(&name) else { continue };
        probes.spawn(async move {
            let error = match timeout(PROBE, permit.probe()).await {
                Ok(Ok(())) => None,
                Ok(Err(error)) => Some(one_line(&error.to_string(), TEXT_MAX)),
                Err(_) => Some(format!("no answer within {} s", PROBE.as_secs())),
            };
            let target = one_line(&permit.target().to_string(), TEXT_MAX);
            (index, json!({"name": name, "target": target, "answers": error.is_none(), "error": error}))
        });
    }
    let mut outbounds = probes.join_all().await;
    outbounds.sort_by_key(|(index, _)| *index);
    outbounds.into_iter().map(|(_, outbound)| outbound).collect()
}

fn keys(agent: &Agent) -> Value {
    let attempts = agent.attempt.progress.borrow().as_ref().map_or(0, |progress| progress.attempt);
    let last_error = agent.attempt.last_error().map(|error| one_line(&error, 2 * TEXT_MAX));
    json!({"attempts": attempts, "last_error": last_error})
}

/// As in hello, with as many entries of each list as a report may have.
fn config(agent: &Agent) -> Option<Value> {
    let config = agent.config()?;
    let first = |list: Vec<String>| -> Vec<String> {
        list.iter().take(STATUS_TUNNELS_MAX).map(|text| one_line(text, TEXT_MAX)).collect()
    };
    Some(json!({
        "pod_id": config.pod_id,
        "worker_nodes": first(config.worker_nodes),
        "inbounds": first(config.inbounds),
        "outbounds": first(config.outbounds),
        "user_data": config.user_data,
    }))
}

fn log_lines() -> Vec<Value> {
    let lines = operator_log().after(0, LOG_KEPT);
    let describe = |line: &crate::os::operator_log::Entry| {
        json!({
            "seq": line.number,
            "age": seconds(line.at.elapsed()),
            "level": level_name(line.level),
            "text": line.text,
        })
    };
    lines.iter().map(describe).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_is_bounded_and_loses_the_oldest_lines_first() {
        let line = |seq: usize| json!({"seq": seq, "text": "\"\\".repeat(2000)});
        let report = bounded(json!({"version": "1"}), (1..=100).map(line).collect());
        assert!(report.len() <= STATUS_MAX && report.ends_with("}\n"), "{}", report.len());
        let report: Value = serde_json::from_str(&report).unwrap();
        let lines = report["log"].as_array().unwrap();
        assert!(report["version"] == "1" && !lines.is_empty() && lines.last().unwrap()["seq"] == 100);
        assert_eq!(bounded(json!({}), vec![]), "{\"log\":[]}\n");
    }
}
