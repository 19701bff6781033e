//! The requests that put something into the KBS, by path: a deletion waits for those that are under way.
//!
//! A client that drops a `POST` does not undo it: the KBS may carry it out later, after a `DELETE` that was sent after it.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::timeout;

/// What is known of the `POST`s to one path.
#[derive(Debug, Default)]
struct Path {
    under_way: watch::Sender<usize>,
    /// Whether one of them may have left something at the path.
    may_hold: bool,
}

/// The `POST`s of all paths.
#[derive(Clone, Debug, Default)]
pub(super) struct Posts(Arc<Mutex<HashMap<String, Path>>>);

/// A `POST` that is under way; ends when it is dropped.
#[derive(Debug)]
pub(super) struct Post {
    posts: Posts,
    path: String,
    /// Whether it may have left something: not if it had no connection.
    sent: bool,
}

impl Posts {
    fn lock(&self) -> MutexGuard<'_, HashMap<String, Path>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn begin(&self, path: &str) -> Post {
        self.lock().entry(path.to_owned()).or_default().under_way.send_modify(|count| *count += 1);
        Post { posts: self.clone(), path: path.to_owned(), sent: true }
    }

    /// Whether a `POST` may have left something at the path, or may still do so.
    pub(super) fn may_hold(&self, path: &str) -> bool {
        self.lock().get(path).is_some_and(|path| path.may_hold || *path.under_way.borrow() > 0)
    }

    /// The path is empty: a deletion was confirmed.
    pub(super) fn deleted(&self, path: &str) {
        let mut posts = self.lock();
        if let Some(state) = posts.get_mut(path) {
            state.may_hold = false;
            if *state.under_way.borrow() == 0 {
                posts.remove(path);
            }
        }
    }

    /// Waits until no `POST` to the path is under way; false if one still is after `limit`.
    pub(super) async fn answered(&self, path: &str, limit: Duration) -> bool {
        let Some(mut under_way) = self.lock().get(path).map(|path| path.under_way.subscribe()) else {
            return true;
        };
        // An error of the channel means that the entry is gone, and with it the last request.
        timeout(limit, under_way.wait_for(|count| *count == 0)).await.is_ok()
    }
}

impl Post {
    /// It never had a connection.
    pub(super) fn not_sent(&mut self) {
        self.sent = false;
    }
}

impl Drop for Post {
    fn drop(&mut self) {
        if let Some(path) = self.posts.lock().get_mut(&self.path) {
            path.may_hold |= self.sent;
            path.under_way.send_modify(|count| *count = count.saturating_sub(1));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_deletion_can_wait_for_requests_under_way() {
        let posts = Posts::default();
        assert!(posts.answered("a", Duration::ZERO).await && !posts.may_hold("a"));
        let (first, second) = (posts.begin("a"), posts.begin("a"));
        drop(first);
        assert!(!posts.answered("a", Duration::from_secs(1)).await);
        assert!(posts.answered("b", Duration::ZERO).await);
        let (answered, ()) =
            tokio::join!(posts.answered("a", Duration::from_secs(1)), async { drop(second) });
        assert!(answered && posts.may_hold("a"));
        posts.deleted("a");
        assert!(!posts.may_hold("a") && posts.lock().is_empty());
    }

    #[test]
    fn a_request_without_a_connection_leaves_nothing() {
        let posts = Posts::default();
        let mut post = posts.begin("a");
        assert!(posts.may_hold("a"));
        post.not_sent();
        drop(post);
        assert!(!posts.may_hold("a"));
    }

    #[test]
    fn a_request_outlives_the_deletion_of_its_path() {
        let posts = Posts::default();
        let post = posts.begin("a");
        posts.deleted("a");
        assert!(posts.may_hold("a"));
        drop(post);
        assert!(posts.may_hold("a"));
    }
}
