//! An IP link between two network namespaces with delay, loss and a rate, as netem makes it on kernels that have it.
//!
//! Each end is a TUN device in its own namespace, with the kernel's TCP behind it; a thread of this process carries
//! the packets between the two. Needs root, iproute2 and `/dev/net/tun`.

mod forwarder;
mod impairment;
mod lane;
mod traffic;

use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use anyhow::{Context, Result};
use secure_comms_tunnel::netns::Namespace;
use tun_rs::{DeviceBuilder, SyncDevice};

use crate::harness::test_namespace::TestNamespace;
use forwarder::{Direction, Forwarder};
pub use impairment::{Impairment, Rate};
pub use traffic::Traffic;

/// Name of the device at either end.
pub const DEVICE: &str = "impaired";
/// MTU of Ethernet, in bytes.
pub const MTU: u16 = 1500;
/// Prefix length of the network that both addresses are in, so that an end can be given another one.
const PREFIX: u8 = 24;
/// Queue of the device in packets, larger than any window: the kernel must not drop packets that the seed did not choose.
const DEVICE_QUEUE: &str = "20000";
/// Buffers of a connection in bytes: least, default, most. The most allows a window of 16 MiB.
const BUFFERS: &str = "4096 131072 33554432";
/// Settings of the namespaces: large windows, and no metrics saved from earlier connections.
const SETTINGS: [(&str, &str); 3] = [
    ("/proc/sys/net/ipv4/tcp_rmem", BUFFERS),
    ("/proc/sys/net/ipv4/tcp_wmem", BUFFERS),
    ("/proc/sys/net/ipv4/tcp_no_metrics_save", "1"),
];

/// One end of a link.
#[derive(Debug)]
pub struct End {
    /// Namespace of this end; [`TestNamespace::command`] starts a process in it.
    pub netns: TestNamespace,
    /// Address on the link.
    pub address: IpAddr,
}

/// An impaired link; removed with both its namespaces when dropped.
#[derive(Debug)]
pub struct ImpairedLink {
    /// One end.
    pub a: End,
    /// The other end.
    pub b: End,
    there: Arc<Shared>,
    back: Arc<Shared>,
    /// Closed to end the thread.
    running: Option<UnixStream>,
    thread: Option<JoinHandle<io::Result<()>>>,
}

/// What the thread and the owner of the link share about one direction.
#[derive(Debug, Default)]
struct Shared {
    impairment: Mutex<Impairment>,
    traffic: traffic::Counters,
}

impl ImpairedLink {
    /// A link that impairs both directions alike, with a random generator that starts from `seed`.
    ///
    /// # Errors
    /// If this process is not root, or the system has no TUN devices.
    pub async fn new(seed: u64, impairment: Impairment) -> Result<Self> {
        Self::with_mtu(seed, impairment, MTU).await
    }

    /// As [`ImpairedLink::new`], with another MTU than [`MTU`].
    ///
    /// # Errors
    /// As there, or if the kernel refuses the MTU.
    pub async fn with_mtu(seed: u64, impairment: Impairment, mtu: u16) -> Result<Self> {
        let (a, device_a) = End::new("link-a", Ipv4Addr::new(10, 99, 0, 1), mtu).await?;
        let (b, device_b) = End::new("link-b", Ipv4Addr::new(10, 99, 0, 2), mtu).await?;
        let (device_a, device_b) = (Arc::new(device_a), Arc::new(device_b));
        let (there, back) = (Arc::<Shared>::default(), Arc::<Shared>::default());
        let (running, stop) = UnixStream::pair().context("impaired link: a socket to stop its thread")?;
        let directions = [
            Direction::new(Arc::clone(&device_a), Arc::clone(&device_b), seed, Arc::clone(&there)),
            // Another random sequence, which the seed alone decides as well.
            Direction::new(device_b, device_a, !seed, Arc::clone(&back)),
        ];
        let mut line = Self { a, b, there, back, running: Some(running), thread: None };
        line.set_both(impairment);
        let thread = std::thread::Builder::new().name(DEVICE.into());
        let thread = thread
            .spawn(move || Forwarder::new(directions, stop).run())
            .context("impaired link: its thread")?;
        line.thread = Some(thread);
        Ok(line)
    }

    /// Impairs the packets that arrive from now on; those in flight are not affected.
    pub fn set(&self, a_to_b: Impairment, b_to_a: Impairment) {
        self.there.set(a_to_b);
        self.back.set(b_to_a);
    }

    /// As [`ImpairedLink::set`], for both directions.
    pub fn set_both(&self, impairment: Impairment) {
        self.set(impairment, impairment);
    }

    /// Counters so far, from `a` to `b` and from `b` to `a`.
    #[must_use]
    pub fn traffic(&self) -> (Traffic, Traffic) {
        (self.there.traffic.read(), self.back.traffic.read())
    }
}

impl Drop for ImpairedLink {
    fn drop(&mut self) {
        drop(self.running.take());
        // The thread owns the devices; the namespaces are removed after them.
        match self.thread.take().map(JoinHandle::join) {
            None | Some(Ok(Ok(()))) => {}
            Some(Ok(Err(error))) => eprintln!("impaired link: it had stopped: {error}"),
            Some(Err(_)) => eprintln!("impaired link: its thread had panicked"),
        }
    }
}

impl End {
    async fn new(label: &str, address: Ipv4Addr, mtu: u16) -> Result<(Self, SyncDevice)> {
        let netns = TestNamespace::new(label)?;
        let device = Namespace::new(netns.name()).run(open).await;
        let device = device.with_context(|| format!("{label}: making its TUN device; this needs root"))?;
        // Without automatic addresses the kernel sends no packets of its own.
        netns.ip(["link", "set", DEVICE, "addrgenmode", "none"])?;
        netns.ip(["link", "set", DEVICE, "mtu", &mtu.to_string(), "txqueuelen", DEVICE_QUEUE, "up"])?;
        netns.address(DEVICE, &format!("{address}/{PREFIX}"))?;
        Ok((Self { netns, address: address.into() }, device))
    }

    /// The namespace, to open sockets of this process in it.
    #[must_use]
    pub fn namespace(&self) -> Namespace {
        Namespace::new(self.netns.name())
    }

    /// Replaces its address by another one of the same network, as when a VM moves.
    ///
    /// # Errors
    /// If the kernel refuses the address.
    pub fn readdress(&mut self, last: u8) -> Result<()> {
        self.netns.ip(["address", "flush", "dev", DEVICE])?;
        let address = Ipv4Addr::new(10, 99, 0, last);
        self.netns.address(DEVICE, &format!("{address}/{PREFIX}"))?;
        self.address = address.into();
        Ok(())
    }
}

/// Runs in the namespace of the thread that calls it.
fn open() -> io::Result<SyncDevice> {
    for (path, value) in SETTINGS {
        std::fs::write(path, value).map_err(|error| io::Error::other(format!("{path}: {error}")))?;
    }
    // With offload, what a network card would segment stays in one piece as long as possible.
    let builder = DeviceBuilder::new().name(DEVICE).enable(false).with(|builder| {
        builder.offload(true);
    });
    let device = builder.build_sync()?;
    device.set_nonblocking(true)?;
    Ok(device)
}

impl Shared {
    fn set(&self, impairment: Impairment) {
        *self.impairment.lock().unwrap_or_else(PoisonError::into_inner) = impairment;
    }

    fn impairment(&self) -> Impairment {
        *self.impairment.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
