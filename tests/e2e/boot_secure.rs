//! Measured and secure boot: the signed disk under Secure Boot, and a TPM's registers as predicted.
//!
//! By name: `tests/build-test-vm && tests/run boot-secure`
#![allow(clippy::unwrap_used, clippy::indexing_slicing)] // a test's helpers fail as the test does

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use secure_comms_tests::boot::{
    Boot, CloudConfig, Machine, MachineOptions, MachinePermit, Platform, Pod, SECURE_VARIABLES, UserData,
    apf_json, artifacts, scene, test_certificate,
};
use serde_json::json;

/// A script of image/, by its path from the top of the sources.
fn image_tool(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().join("image").join(name)
}

fn run(command: &mut Command) -> Result<String> {
    let output = command.output().with_context(|| format!("running {command:?}"))?;
    ensure!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8(output.stdout)?)
}

/// Lines of image/measure for `file`, with these options.
fn predict(options: &[&str], file: &Path) -> Result<String> {
    run(Command::new(image_tool("measure")).args(options).arg(file))
}

/// Checks that the registers of the VM's TPM are exactly as predicted, and that these were predicted.
async fn registers_are(pod: &Pod, predicted: &str, registers: &[&str]) -> Result<()> {
    let lines: Vec<_> = predicted.lines().filter_map(|line| line.split_once(' ')).collect();
    let named: Vec<_> = lines.iter().map(|(register, _)| *register).collect();
    ensure!(named == registers, "predicted are {named:?}, not {registers:?}");
    for (register, digest) in lines {
        let path = format!("/sys/class/tpm/tpm0/pcr-sha256/{register}");
        let found = pod.inspection.read(&path).await?;
        println!("PCR {register}: predicted {digest}, found {}", found.trim());
        ensure!(found.trim().eq_ignore_ascii_case(digest), "PCR {register} is not as predicted");
    }
    Ok(())
}

async fn start_on(platform: Platform, name: &'static str, boot: Boot, user_data: UserData) -> Result<Pod> {
    let scene = scene(false).await?;
    let options = MachineOptions { platform, ..MachineOptions::new(name, boot, scene.ssh, user_data) };
    Pod::start_as(scene, options).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_signed_disk_boots_under_secure_boot() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let signer = test_certificate(directory.path())?;
    let disk = directory.path().join("signed.raw");
    let mut sign = Command::new(image_tool("sign"));
    sign.arg("--key").arg(&signer.key).arg("--cert").arg(&signer.certificate).arg("--output").arg(&disk);
    run(sign.arg(artifacts()?.file("podvm.raw")?))?;

    let user_data = UserData::NoCloud(CloudConfig::new(apf_json(&json!({}))?));
    let boot = Boot::Disk(Some(disk.clone()));
    let pod = start_on(Platform::SecureBoot, "secure-boot", boot, user_data).await?;
    pod.works().await?;
    // Four bytes of attributes, then the value.
    let variable = "/sys/firmware/efi/efivars/SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c";
    let on = pod.inspection.run(&["od", "-An", "-tu1", variable]).await?;
    ensure!(
        on.split_whitespace().last() == Some("1"),
        "the firmware does not say that Secure Boot is on: {on}"
    );
    let options = ["--secure-boot", "on", "--variables", SECURE_VARIABLES];
    registers_are(&pod, &predict(&options, &disk)?, &["4", "7", "9", "11", "12"]).await?;
    pod.machine.passed();
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unsigned_disk_never_starts_under_secure_boot() -> Result<()> {
    let scene = scene(false).await?;
    let user_data = UserData::NoCloud(CloudConfig::new(apf_json(&json!({}))?));
    let options = MachineOptions {
        platform: Platform::SecureBoot,
        no_reboot: true,
        ..MachineOptions::new("secure-boot-unsigned", Boot::Disk(None), scene.ssh, user_data)
    };
    let machine = Machine::start(MachinePermit::take().await, &options).await?;
    println!("{}", machine.says_after(0, "Access Denied").await?);
    // The firmware has nothing else to boot, and prints that.
    let gave_up = machine.says_after(0, "No bootable option or device was found").await?;
    println!("{gave_up}");
    let log = machine.console.log();
    ensure!(!log.contains("init: "), "it started all the same:\n{log}");
    machine.passed();
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_registers_of_a_tpm_are_as_predicted() -> Result<()> {
    let predicted = predict(&["--secure-boot", "off"], &artifacts()?.file("podvm.efi")?)?;
    let user_data = UserData::NoCloud(CloudConfig::new(apf_json(&json!({}))?));
    let pod = start_on(Platform::Tpm, "tpm", Boot::Disk(None), user_data).await?;
    pod.works().await?;
    registers_are(&pod, &predicted, &["4", "7", "9", "11", "12"]).await?;
    pod.machine.passed();
    Ok(())
}
