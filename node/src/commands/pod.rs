//! `pod`: shows and drives the pods of this node's service.

mod drive;
mod find;
mod list;
mod orphans;
mod select;
mod show;
mod watch;

pub(super) use self::find::find;
pub(super) use self::list::phase_colour;
pub(super) use self::select::word as phase_word;
pub(super) use self::show::recent as recent_events;

use serde::Serialize;

use super::screen::{Screen, show as show_text};
use crate::api::client::Client;
use crate::cli::service::{PodArgs, PodCommand};
use crate::settings::{Env, ServiceSettings};

/// Runs a command of `pod`.
///
/// # Errors
/// The flags are invalid, the service does not answer or refuses, or the output cannot be written.
pub async fn run(args: PodArgs, env: Env<'_>) -> anyhow::Result<()> {
    let client = Client::new(ServiceSettings::read(args.service, env)?.socket);
    let screen = Screen::of_stdout(env);
    match args.command {
        PodCommand::List(args) => list::run(&client, args, screen).await,
        PodCommand::Show(args) => show::run(&client, &args, screen).await,
        PodCommand::Watch(args) => watch::run(&client, args, screen).await,
        PodCommand::Start(args) => drive::start(&client, *args).await,
        PodCommand::Stop(args) => drive::stop(&client, &args).await,
        PodCommand::Forget(args) => drive::forget(&client, &args).await,
        PodCommand::Orphans(args) => orphans::run(&client, &args, screen).await,
    }
}

/// Prints an object of the API.
pub(super) fn print_json(object: &impl Serialize) -> anyhow::Result<()> {
    show_text(&(serde_json::to_string_pretty(object)? + "\n")).map(drop)
}

/// Prints an object of the API.
pub(super) fn print_yaml(object: &impl Serialize) -> anyhow::Result<()> {
    let mut text = serde_saphyr::to_string(object)?;
    if !text.ends_with('\n') {
        text.push('\n');
    }
    show_text(&text).map(drop)
}
