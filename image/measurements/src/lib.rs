//! What a pod VM's registers hold once its UKI has started, known before it does.
//!
//! A boot is a list of [`event::Event`]s in the order in which they are measured; a register is what extending it by its events
//! yields. docs/IMAGE.md says who measures what, and what a policy should compare.

pub mod boot;
pub mod cpio;
pub mod event;
pub mod init_data;
pub mod launch;
pub mod pe;
pub mod register;
pub mod report;
pub mod secure_boot;
pub mod variables;
