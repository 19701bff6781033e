//! Predicts what a TPM's registers hold once a UKI has started: `image/measure` runs it.

use std::fmt::Display;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use argh::FromArgs;
use measurements::boot::Uki;
use measurements::event::Event;
use measurements::init_data::InitDataDigest;
use measurements::launch::{self, SnpMachine};
use measurements::report::{Format, Prediction};
use measurements::secure_boot;
use measurements::variables::Variables;

/// What the registers of a VM hold once a UKI has started, for an attestation policy: a line `PCR DIGEST` each, for a vTPM's
/// SHA-256 bank. PCR 9, 11 and 12 always; PCR 4 and 7 with --secure-boot; PCR 8 with --init-data or --init-data-digest; the
/// launch digest with --launch.
#[derive(FromArgs)]
struct Arguments {
    /// the UKI, an EFI program, as it is on the disk (image/measure takes a disk as well)
    #[argh(positional)]
    uki: PathBuf,

    /// form of the output: text (default), json (with the events), rvps (a message for rvps-tool register), or
    /// reference-values (what that message carries)
    #[argh(option, default = "Format::Text")]
    format: Format,

    /// state of Secure Boot: on or off. Predicts PCR 4 and 7
    #[argh(option)]
    secure_boot: Option<String>,

    /// its variables: a directory with PK, KEK, db and dbx, named so or as in efivarfs, or OVMF's file of variables. Needed with on;
    /// none with off, unless the machine has some
    #[argh(option)]
    variables: Option<PathBuf>,

    /// init-data as TOML. Predicts PCR 8
    #[argh(option)]
    init_data: Option<PathBuf>,

    /// digest of init-data, in hex. Predicts PCR 8
    #[argh(option)]
    init_data_digest: Option<String>,

    /// launch digest of a VM: snp, which boots the UKI's parts directly, or snp-firmware, whose firmware boots a disk. Needs
    /// sev-snp-measure, --ovmf and --vcpus
    #[argh(option)]
    launch: Option<String>,

    /// firmware of that VM; with snp, OVMF with a table for the hashes of kernel, initrd and command line (its AmdSev build)
    #[argh(option)]
    ovmf: Option<PathBuf>,

    /// number of processors of that VM
    #[argh(option)]
    vcpus: Option<u32>,

    /// their type, as qemu names it (default: EPYC-v4)
    #[argh(option, default = "String::from(\"EPYC-v4\")")]
    vcpu_type: String,

    /// SEV features of that VM (default: 1, SNP only)
    #[argh(option, default = "1")]
    guest_features: u64,
}

fn main() -> ExitCode {
    let arguments: Arguments = argh::from_env();
    match predict(&arguments) {
        Ok(prediction) => {
            print!("{}", prediction.print(arguments.format));
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("image/measure: {error}");
            ExitCode::FAILURE
        }
    }
}

fn predict(arguments: &Arguments) -> Result<Prediction, String> {
    let file = read(&arguments.uki)?;
    let in_uki = |error: &dyn Display| format!("{}: {error}", arguments.uki.display());
    let uki = Uki::parse(&file).map_err(|error| in_uki(&error))?;
    let (mut registers, mut events) = (vec![9, 11, 12], Vec::new());
    if let Some(state) = &arguments.secure_boot {
        events.extend(secure_boot(state, arguments.variables.as_deref(), &uki)?);
        registers.extend([4, 7]);
    } else if arguments.variables.is_some() {
        return Err("--variables needs --secure-boot".to_owned());
    }
    events.extend(uki.parts().map_err(|error| in_uki(&error))?);
    if let Some(digest) = init_data(arguments)? {
        events.push(digest.event().map_err(described)?);
        registers.push(8);
    }
    let snp_launch = launch(arguments, &uki)?;
    Ok(Prediction { registers, events, snp_launch })
}

/// Events of PCR 7 and PCR 4.
fn secure_boot(state: &str, variables: Option<&Path>, uki: &Uki<'_>) -> Result<Vec<Event>, String> {
    let (mut events, on) = match (state, variables) {
        ("off", None) => (secure_boot::off(&Variables::default()), false),
        ("off", Some(path)) => (secure_boot::off(&Variables::read(path).map_err(described)?), false),
        ("on", Some(path)) => {
            let variables = Variables::read_with_keys(path).map_err(described)?;
            let signatures = uki.signatures().map_err(described)?;
            (secure_boot::on(&variables, signatures).map_err(described)?, true)
        }
        ("on", None) => return Err("--secure-boot on needs --variables".to_owned()),
        (other, _) => return Err(format!("--secure-boot {other}: on or off")),
    };
    events.extend(uki.loaded(on).map_err(described)?);
    Ok(events)
}

fn init_data(arguments: &Arguments) -> Result<Option<InitDataDigest>, String> {
    match (&arguments.init_data, &arguments.init_data_digest) {
        (Some(_), Some(_)) => Err("--init-data or --init-data-digest, not both".to_owned()),
        (Some(path), None) => {
            let digest = InitDataDigest::of(&read(path)?);
            digest.map(Some).map_err(|error| format!("--init-data {}: {error}", path.display()))
        }
        (None, Some(text)) => {
            InitDataDigest::parse(text).map(Some).map_err(|error| format!("--init-data-digest: {error}"))
        }
        (None, None) => Ok(None),
    }
}

fn launch(arguments: &Arguments, uki: &Uki<'_>) -> Result<Option<String>, String> {
    match arguments.launch.as_deref() {
        None => Ok(None),
        Some(kind @ ("snp" | "snp-firmware")) => {
            let (Some(firmware), Some(processors)) = (arguments.ovmf.clone(), arguments.vcpus) else {
                return Err(format!("--launch {kind} needs --ovmf and --vcpus"));
            };
            let (processor, guest_features) = (arguments.vcpu_type.clone(), arguments.guest_features);
            let direct = kind == "snp";
            let machine = SnpMachine { firmware, processors, processor, guest_features, direct };
            launch::snp(&machine, uki).map(Some).map_err(described)
        }
        Some("tdx") => Err("--launch tdx: no registry has a program that computes MRTD (docs/IMAGE.md); \
             --format json has RTMR 2"
            .to_owned()),
        Some(other) => Err(format!("--launch {other}: snp or snp-firmware")),
    }
}

fn read(path: &Path) -> Result<Vec<u8>, String> {
    std::fs::read(path).map_err(|error| format!("{}: {error}", path.display()))
}

/// An error with its causes, in one line.
fn described(error: impl std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&one_line(cause));
        source = cause.source();
    }
    text
}

fn one_line(text: impl Display) -> String {
    text.to_string().replace(|c: char| c.is_control(), " ")
}
