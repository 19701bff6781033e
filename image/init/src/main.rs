//! `init`: PID 1 of the pod VM's initrd. Verifies the root that the kernel command line names, and executes its
//! systemd. On a failure it prints the cause in one line and powers off. It never starts a shell or an unverified
//! root.

use std::convert::Infallible;
use std::fs;
use std::os::unix::process::CommandExt;
use std::process::Command;

use podvm_init::dm::Verity;
use podvm_init::failure::{Context, Failure};
use podvm_init::uevents::Uevents;
use podvm_init::{block_watcher, cmdline, console, disk, erofs, modules, mounts, power, table};

/// Mount point of the root before it becomes the root.
const NEW_ROOT: &str = "/sysroot";
/// Paths of the root's own PID 1; the first that exists is executed.
const NEXT: [&str; 2] = ["/usr/lib/systemd/systemd", "/sbin/init"];

fn main() {
    power::off_on_panic();
    if std::env::args().nth(1).as_deref() == Some(block_watcher::ARGUMENT) && std::process::id() != 1 {
        block_watcher::run();
    }
    match boot() {
        Err(failure) => power::fatal(failure),
    }
}

fn boot() -> Result<Infallible, Failure> {
    mounts::kernel_file_systems()?;
    console::open()?;
    console::say(format_args!("started {} after the kernel", console::uptime()));
    let line = fs::read_to_string("/proc/cmdline").context(|| "reading /proc/cmdline")?;
    let root_hash =
        cmdline::root_hash(&line).context(|| "looking for the root on the kernel command line")?;
    let events = Uevents::listen()?;
    modules::load_all(modules::LIST)?;

    let disk = disk::wait(&root_hash, &events)?;
    let superblock = disk::superblock(&disk)?;
    let table = table::verity(&superblock, &root_hash, &disk.data.device, &disk.hash.device);
    let (verity, device) = Verity::create(&table, superblock.data_bytes())?;
    erofs::check_covered(&device, superblock.data_bytes())?;
    mounts::root(&device, NEW_ROOT)?;
    block_watcher::start(events, verity)?;
    console::say(format_args!(
        "root is verified and mounted, {} since the kernel started",
        console::uptime()
    ));

    mounts::switch_root(NEW_ROOT)?;
    Err(exec_real_init())
}

/// Executes the root's own PID 1 in place of this program; returns only if that fails. Passes on only TERM, because the
/// kernel makes the environment from its command line.
fn exec_real_init() -> Failure {
    let next = NEXT.into_iter().find(|path| fs::exists(path).unwrap_or(true));
    let Some(next) = next else {
        return Failure::new(
            "starting the root's PID 1",
            format_args!("none of {} is there", NEXT.join(", ")),
        );
    };
    let terminal = std::env::var_os("TERM").unwrap_or_else(|| "linux".into());
    let error = Command::new(next).env_clear().env("TERM", terminal).exec();
    Failure::new(format!("starting {next}"), error)
}
