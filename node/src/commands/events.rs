//! `--events json`: what happens to the pod, for a program that reads standard output. docs/operations/REFERENCE.md
//! defines the objects.

use std::io;
use std::time::Duration;

use secure_comms_adaptor::Endpoint;
use secure_comms_adaptor::pod::PodEvent;
use secure_comms_keys::text::escape;
use secure_comms_protocol::{KeyProgress, PodId};
use serde_json::{Map, Value, json};

use crate::logging::{Writer, now};

/// Writes events to standard output, if they are wanted.
#[derive(Clone, Debug)]
pub(super) struct Events(Option<Writer>);

impl Events {
    /// # Errors
    /// The thread that writes cannot be started.
    pub(super) fn new(wanted: bool) -> io::Result<Self> {
        let dropped = |count| object("dropped", None, [("count", json!(count))]);
        Ok(Self(if wanted { Some(Writer::start(io::stdout(), dropped)?) } else { None }))
    }

    pub(super) fn listening(&self, pod: &PodId, endpoint: &Endpoint) {
        let fields = [("tunnel", json!(endpoint.name.as_str())), ("local", json!(endpoint.local))];
        self.write(|| object("listening", Some(pod), fields));
    }

    pub(super) fn happened(&self, pod: &PodId, event: &PodEvent) {
        self.write(|| line(pod, event));
    }

    /// Waits until all events are written, for at most `limit`.
    pub(super) fn flush(&self, limit: Duration) {
        if let Self(Some(writer)) = self {
            writer.flush(limit);
        }
    }

    fn write(&self, line: impl FnOnce() -> String) {
        if let Self(Some(writer)) = self {
            writer.line(&line());
        }
    }
}

fn line(pod: &PodId, event: &PodEvent) -> String {
    let pod = Some(pod);
    match event {
        PodEvent::Attesting(address) => object("attesting", pod, [("address", json!(address))]),
        PodEvent::Keys(KeyProgress { attempt, error }) => {
            let error = error.as_deref().map(escape);
            object("keys", pod, [("attempt", json!(attempt)), ("error", json!(error))])
        }
        PodEvent::Upgrade(address) => object("attested", pod, [("address", json!(address))]),
        PodEvent::Up(address) => object("up", pod, [("address", json!(address))]),
        PodEvent::Resumed { address, after, streams } => {
            let after = (after.as_secs_f64() * 1000.0).round() / 1000.0;
            object(
                "up",
                pod,
                [("address", json!(address)), ("after", json!(after)), ("streams", json!(streams))],
            )
        }
        PodEvent::SessionOver(why) => object("session-over", pod, [("reason", json!(escape(why)))]),
        PodEvent::Down(phase, why) => {
            object("down", pod, [("phase", json!(phase)), ("reason", json!(escape(why)))])
        }
        PodEvent::ConnectFailed(why) => object("connect-failed", pod, [("reason", json!(escape(why)))]),
        PodEvent::TunnelMismatch(what) => object("tunnel-mismatch", pod, [("text", json!(escape(what)))]),
        PodEvent::Waiting { what, left } => {
            let left = left.map(|left| left.as_secs());
            object("waiting", pod, [("for", json!(escape(what))), ("left", json!(left))])
        }
        PodEvent::Published => object("published", pod, []),
        PodEvent::Withdrawn => object("withdrawn", pod, []),
        PodEvent::WithdrawFailed(why) => object("withdraw-failed", pod, [("reason", json!(escape(why)))]),
        PodEvent::InitDataMismatch(what) => {
            object("init-data-mismatch", pod, [("text", json!(escape(what)))])
        }
        PodEvent::PublishedAgain => object("published-again", pod, []),
        PodEvent::PublishFailed(why) => object("publish-failed", pod, [("reason", json!(escape(why)))]),
        PodEvent::DeleteFailed(why) => object("delete-failed", pod, [("reason", json!(escape(why)))]),
        PodEvent::Deleted => object("deleted", pod, []),
        PodEvent::Stopped => object("stopped", pod, []),
        other => object("other", pod, [("text", json!(escape(&other.to_string())))]),
    }
}

fn object<const N: usize>(event: &str, pod: Option<&PodId>, fields: [(&str, Value); N]) -> String {
    let mut all = Map::new();
    all.insert("time".to_owned(), now().into());
    all.insert("event".to_owned(), event.into());
    all.extend(pod.map(|pod| ("pod".to_owned(), pod.as_str().into())));
    all.extend(fields.into_iter().map(|(name, value)| (name.to_owned(), value)));
    Value::Object(all).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_is_one_json_object_on_one_line() {
        let pod: PodId = "p1".parse().unwrap();
        let read = |event: PodEvent| -> Value {
            let line = line(&pod, &event);
            assert!(!line.contains('\n'), "{line}");
            serde_json::from_str(&line).unwrap()
        };
        let up = read(PodEvent::Up("[::1]:2222".parse().unwrap()));
        assert_eq!(
            (&up["event"], &up["pod"], &up["address"]),
            (&"up".into(), &"p1".into(), &"[::1]:2222".into())
        );
        assert!(up["time"].as_str().unwrap().ends_with('Z'));
        let resumed = PodEvent::Resumed {
            address: "[::1]:2222".parse().unwrap(),
            after: Duration::from_millis(1234),
            streams: 3,
        };
        let resumed = read(resumed);
        assert_eq!(
            (&resumed["event"], &resumed["after"], &resumed["streams"]),
            (&"up".into(), &1.234.into(), &3.into())
        );
        assert_eq!(read(PodEvent::SessionOver("bye".into()))["event"], "session-over");
        let keys = read(PodEvent::Keys(KeyProgress { attempt: 2, error: Some("a\nb".into()) }));
        assert_eq!((&keys["attempt"], &keys["error"]), (&2.into(), &"a\\nb".into()));
        assert!(read(PodEvent::Keys(KeyProgress { attempt: 3, error: None }))["error"].is_null());
        let phase = secure_comms_protocol::PhaseName::Kubernetes;
        assert_eq!(read(PodEvent::Down(phase, "bye".into()))["phase"], "kubernetes");
        assert_eq!(read(PodEvent::Stopped)["event"], "stopped");
    }
}
