//! A pod's task while the pod has a channel.

use std::sync::Arc;

use secure_comms_protocol::TunnelName;

use super::{Actor, Publishing};
use crate::address::Address;
use crate::pod::{Ended, Entry, LOST, PodEvent, PodState};
use crate::registry::channel::Channel;
use crate::registry::command::{Reply, StartOrder};
use crate::registry::error::AdaptorError;
use crate::registry::operation::Acquired;
use crate::text::with_causes;
use crate::transport::routes::KubernetesLink;

impl Actor {
    /// Opens the channel: for a start, or again for a pod of an earlier process.
    pub(super) fn open_channel(&mut self, addresses: Vec<Address>, start: Option<StartOrder>) {
        let Some(served) = &self.served else { return };
        let entry = if start.is_some() { Entry::New } else { Entry::Restarted };
        let publication = self.publication.clone();
        self.status.status.located(&addresses);
        let plan = Channel::plan(&self.id, &self.shared, served, publication, addresses);
        // Before the driver runs: a start must not take the final state of an earlier one for its own.
        self.status.status.begin();
        self.republish.begin(entry);
        self.channel =
            Some(Channel::open(plan, Arc::clone(&served.routes), self.status.status.clone(), start));
    }

    /// Hands a link of the Kubernetes phase to a caller that opens a stream on it.
    pub(super) fn open_stream(&mut self, name: TunnelName, reply: Reply<KubernetesLink>) {
        let link = self.served.as_ref().and_then(|served| served.routes.kubernetes());
        let result = match link {
            Some(link) if self.ending.is_none() => Ok(link),
            _ => Err(AdaptorError::NotOpened {
                pod: self.id.clone(),
                tunnel: name,
                reason: "the Kubernetes phase is not up".to_owned(),
            }),
        };
        self.answer(reply, result);
    }

    pub(super) fn on_state(&mut self) {
        let state = self.states.borrow_and_update().state.clone();
        let needed = self.publication.as_ref().filter(|publication| publication.is_needed());
        self.republish.on_state(&state, needed.map(|publication| publication.is_gone()));
        let up = matches!(state, PodState::Up { .. });
        if let Some(channel) = &mut self.channel
            && up
            && let Some(reply) = channel.take_waiter()
        {
            self.answer(reply, Ok(()));
        }
    }

    pub(super) fn on_start_deadline(&mut self) {
        // The pod may have come up at the same moment.
        self.on_state();
        let last_seen = self.status.status.last_seen();
        if let Some(channel) = &mut self.channel {
            channel.give_up(&self.id, last_seen);
        }
    }

    pub(super) fn on_channel_ended(&mut self, ended: Ended) {
        let Some(mut channel) = self.channel.take() else { return };
        self.republish.forget();
        if let Some((reply, error, reason)) = channel.take_verdict() {
            self.status.status.set_state(PodState::Failed { reason });
            return self.answer(reply, Err(error));
        }
        match &ended {
            Ended::Stopped => {
                self.status.status.set_state(PodState::Stopped);
                self.status.status.emit(&PodEvent::Stopped);
            }
            Ended::VmLost => self.status.status.set_state(PodState::Failed { reason: LOST.into() }),
            Ended::Unexpected(why) => self.status.status.set_state(PodState::Failed { reason: why.clone() }),
        }
        if let Some(reply) = channel.take_waiter() {
            let error = match ended {
                Ended::Stopped => self.stopped(),
                Ended::VmLost => AdaptorError::StartFailed { pod: self.id.clone(), reason: LOST.to_owned() },
                Ended::Unexpected(reason) => AdaptorError::UnexpectedAgent { pod: self.id.clone(), reason },
            };
            self.answer(reply, Err(error));
        }
    }

    pub(super) fn can_publish_again(&self) -> bool {
        self.publishing.is_none()
            && self.channel.is_some()
            && self.ending.is_none()
            && self.shared.key_source.attests()
    }

    pub(super) fn publish_again(&mut self) {
        let (context, _) = self.context();
        self.republish.published();
        self.publishing = Some(Publishing { work: Box::pin(context.publish_keys()), reply: None });
    }

    pub(super) fn on_published(&mut self, acquired: &Acquired, result: Result<(), AdaptorError>) {
        let Some(publishing) = self.publishing.take() else { return };
        if acquired.published {
            self.republish.published();
        }
        match (publishing.reply, result) {
            (Some(reply), result) => self.answer(reply, result),
            // The pod has come up since.
            (None, Ok(())) if !acquired.published => {}
            (None, Ok(())) => self.status.status.emit(&PodEvent::PublishedAgain),
            (None, Err(error)) => self.status.status.publish_failed(&with_causes(&error)),
        }
    }
}
