//! `GET /v1/events`: server-sent events.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::http::HeaderMap;
use axum::http::header::{CACHE_CONTROL, CONTENT_TYPE};
use axum::response::{IntoResponse, Response};
use futures_util::stream::unfold;
use secure_comms_protocol::PodId;
use serde::Serialize;
use tokio::sync::{OwnedSemaphorePermit, watch};
use tokio::time::sleep;

use super::super::described;
use super::super::events::{History, Place, Read};
use super::super::input::{EventsQuery, Fields};
use super::super::problem::Kind;
use super::super::stopped;
use super::super::types::{Event, Lost, Problem};
use super::Api;

/// Time between the comments of a stream without events.
const KEEP_ALIVE: Duration = Duration::from_secs(15);
/// Where a reader was, before it lost its connection.
const LAST_EVENT_ID: &str = "last-event-id";

/// What happens to the pods from now on, as server-sent events.
///
/// `pod` events have an [`Event`] as data. A reader that is too slow, or comes too late for the events after its
/// `Last-Event-ID`, gets a `lost` event with a [`Lost`]. While nothing happens a comment is sent every 15 s. The stream
/// ends with the service.
#[utoipa::path(get, path = "/v1/events", tag = "events",
    params(
        ("pod" = Option<String>, Query, description = "Id of the pod; all pods by default",
            pattern = "^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$"),
        ("Last-Event-ID" = Option<String>, Header, description = "Id of the last event that the reader has"),
    ),
    responses(
    (status = 200, description = "The events", body = String, content_type = "text/event-stream"),
    described::WithInput,
    described::Always,
))]
pub(super) async fn events(
    State(api): State<Api>,
    Fields(query): Fields<EventsQuery>,
    headers: HeaderMap,
) -> Result<Response, Box<Problem>> {
    let pod = query.pod()?;
    let permit = std::sync::Arc::clone(&api.0.readers).try_acquire_owned();
    let permit = permit.map_err(|_| {
        Kind::Busy.problem(format!("{} readers of events is all there may be", super::READERS_MAX))
    })?;
    let history = api.0.history.clone();
    let place = match headers.get(LAST_EVENT_ID) {
        Some(id) => id.to_str().ok().and_then(Place::parse).unwrap_or_else(Place::unknown),
        None => history.end(),
    };
    let news = history.news();
    let first = Bytes::from(format!(": events of the pods\nretry: 1000\nid: {place}\n\n"));
    let reader = Reader {
        history,
        news,
        stop: api.0.stop.clone(),
        pod,
        place,
        ready: VecDeque::from([first]),
        _permit: permit,
    };
    let stream = unfold(reader, |mut reader| async move {
        let frame = reader.next().await?;
        Some((Ok::<_, Infallible>(frame), reader))
    });
    let headers = [(CONTENT_TYPE, "text/event-stream"), (CACHE_CONTROL, "no-store")];
    Ok((headers, Body::from_stream(stream)).into_response())
}

/// One reader of events.
struct Reader {
    history: History,
    news: watch::Receiver<u64>,
    stop: watch::Receiver<bool>,
    pod: Option<PodId>,
    place: Place,
    ready: VecDeque<Bytes>,
    _permit: OwnedSemaphorePermit,
}

impl Reader {
    /// The next piece of the stream; `None`: the service ends.
    async fn next(&mut self) -> Option<Bytes> {
        loop {
            if let Some(frame) = self.ready.pop_front() {
                return Some(frame);
            }
            self.news.mark_unchanged();
            let read = self.history.read(self.place);
            for (place, read) in &read {
                self.place = *place;
                self.ready.extend(self.frame(*place, read));
            }
            if !read.is_empty() {
                continue;
            }
            tokio::select! {
                () = stopped(self.stop.clone()) => return None,
                news = self.news.changed() => news.ok()?,
                () = sleep(KEEP_ALIVE) => return Some(Bytes::from_static(b": keep-alive\n\n")),
            }
        }
    }

    fn frame(&self, place: Place, read: &Read) -> Option<Bytes> {
        match read {
            Read::Lost(count) => Some(frame(place, "lost", &Lost { count: *count })),
            Read::Event(event) if self.wants(event) => Some(frame(place, "pod", &**event)),
            Read::Event(_) => None,
        }
    }

    fn wants(&self, event: &Event) -> bool {
        self.pod.as_ref().is_none_or(|pod| pod.as_str() == event.pod)
    }
}

fn frame(place: Place, name: &str, data: &impl Serialize) -> Bytes {
    // A struct of texts and numbers is always JSON, in one line.
    let data = serde_json::to_string(data).unwrap_or_default();
    Bytes::from(format!("id: {place}\nevent: {name}\ndata: {data}\n\n"))
}
