//! `doctor`: what is wrong with this node or a pod, and what to do about it.
//!
//! In: where things are ([`Node`]). Out: a [`Report`]: groups of [`Finding`]s, each with a mark and, where something is
//! wrong, a fix. Each check is a function that looks at one thing; it changes nothing but a probe file in the store and a
//! probe resource at the KBS, which it deletes. Nothing secret is read into a finding.

mod clock;
mod kbs;
mod processes;
mod report;
mod store;

pub use self::kbs::Kbs;
pub use self::report::{Finding, Group, Marks, Outcome, Report};
