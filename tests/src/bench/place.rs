//! Where the two ends of a contender run.

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener};

use anyhow::{Context, Result};
use tokio::process::Command;

use crate::simulators::impaired_link::ImpairedLink;

/// The worker node, the VM, and the path between them.
#[derive(Debug)]
pub(super) enum Place {
    /// Both on this machine's loopback.
    Here,
    /// Each in its own namespace, at the ends of an impaired link.
    Apart(Box<ImpairedLink>),
}

impl Place {
    /// Address of the VM, for the worker node.
    #[must_use]
    pub(super) fn vm(&self) -> IpAddr {
        match self {
            Self::Here => IpAddr::V4(Ipv4Addr::LOCALHOST),
            Self::Apart(line) => line.b.address,
        }
    }

    /// Makes a command run in the VM; its process keeps the pid.
    #[must_use]
    pub(super) fn in_vm(&self, command: Command) -> Command {
        match self {
            Self::Here => command,
            Self::Apart(line) => inside(line.b.netns.command(command.as_std().get_program()), &command),
        }
    }

    /// Makes a command run on the worker node; its process keeps the pid.
    #[must_use]
    pub(super) fn on_node(&self, command: Command) -> Command {
        match self {
            Self::Here => command,
            Self::Apart(line) => inside(line.a.netns.command(command.as_std().get_program()), &command),
        }
    }

    /// Listens in the VM, on its loopback.
    ///
    /// # Errors
    /// If the namespace can't be entered.
    pub(super) async fn listen_in_vm(&self) -> Result<TcpListener> {
        let bind = || TcpListener::bind(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)));
        match self {
            Self::Here => Ok(bind()?),
            Self::Apart(line) => Ok(line.b.namespace().run(bind).await?),
        }
    }

    /// Runs a job on a thread at the worker node; threads that it starts are there, too.
    ///
    /// # Errors
    /// The job's error, or if the namespace can't be entered.
    pub(super) async fn at_node<T: Send + 'static>(
        &self,
        job: impl FnOnce() -> Result<T> + Send + 'static,
    ) -> Result<T> {
        match self {
            Self::Here => {
                tokio::task::spawn_blocking(job).await.context("the thread at the worker node died")?
            }
            Self::Apart(line) => {
                // The job's result is a value here, to tell its errors from those of the namespace.
                line.a.namespace().run(move || io::Result::Ok(job())).await?
            }
        }
    }
}

fn inside(mut command: Command, what: &Command) -> Command {
    command.args(what.as_std().get_args());
    for (name, value) in what.as_std().get_envs() {
        match value {
            Some(value) => command.env(name, value),
            None => command.env_remove(name),
        };
    }
    command
}
