//! The pods directory: files that are late, half written, broken, replaced or gone, and layouts that no CAA has.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use secure_comms_tests::harness::shim::Shim;
use secure_comms_tests::simulators::caa::{Line, apf};
use serde_json::Value;

use secure_comms_tests::harness::scene::PATIENCE;

use crate::{BLOCK, SHORT, Scene};

impl Scene {
    fn apf_json(&self, shim: &Shim) -> PathBuf {
        self.node.caa.directory(&shim.id).join("apf.json")
    }

    /// A sandbox that was created, with its agent's socket and its file.
    async fn created(&self, name: &str) -> Result<(Shim, PathBuf, PathBuf)> {
        let shim = self.node.shim(name)?;
        let agent = shim.create_vm().await?;
        let file = self.apf_json(&shim);
        Ok((shim, agent, file))
    }
}

fn read(file: &Path) -> Result<Value> {
    Ok(serde_json::from_slice(&fs::read(file)?)?)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_starts_once_its_file_is_whole() -> Result<()> {
    let scene = Scene::new(PATIENCE).await?;
    let test = async {
        let (shim, agent, file) = scene.created("late").await?;
        let whole = fs::read(&file)?;
        fs::remove_file(&file)?;
        let starting = scene.node.start(&shim).await?;
        let mark = scene.serve.mark();
        fs::write(&file, &whole[..whole.len() / 2])?;
        scene.says(mark, Some(&shim), "apf.json").await?;
        ensure!(*starting.line.borrow() != Line::Up, "a pod without keys was connected");
        fs::write(&file, &whole)?;
        starting.started().await?;
        let mut runtime = shim.connect(&agent).await?;
        runtime.exchange(BLOCK).await?;
        shim.end(runtime).await?;
        scene.node.forgets(&shim.id).await
    };
    scene.within(test).await?;
    scene.finish().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broken_file_is_named_and_only_its_pod_waits() -> Result<()> {
    let scene = Scene::new(PATIENCE).await?;
    let test = async {
        for broken in ["", "no json", "[]", "{}", "{\"pod-name\": 7}"] {
            let (shim, _, file) = scene.created("broken").await?;
            let whole = fs::read(&file)?;
            let mark = scene.serve.mark();
            fs::write(&file, broken)?;
            let starting = scene.node.start(&shim).await?;
            scene.says(mark, Some(&shim), "apf.json").await.with_context(|| format!("file {broken:?}"))?;
            fs::write(&file, &whole)?;
            starting.started().await.with_context(|| format!("after file {broken:?}"))?;
            shim.stop_vm().await?;
            scene.node.forgets(&shim.id).await?;
        }
        Ok(())
    };
    scene.within(test).await?;
    scene.finish().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_of_another_pod_is_refused_with_the_reason() -> Result<()> {
    let scene = Scene::new(SHORT).await?;
    let test = async {
        let (shim, _, file) = scene.created("mismatch").await?;
        let other = read(&scene.apf_json(&scene.bystander))?;
        let mut json = read(&file)?;
        json["tls-server-key"] = other["tls-server-key"].clone();
        fs::remove_file(&file)?;
        apf::write(&file, &json)?;
        let mut starting = scene.node.start(&shim).await?;
        starting.is("ended", |line| matches!(line, Line::Ended(_))).await?;
        // The certificate's name, which has the pod's name and the first digits of its id, is all that the line names.
        let name = scene.node.caa.server_name(&shim.id)?;
        let reason = format!("the server's private key does not fit its certificate for '{name}'");
        scene.says(0, None, &reason).await?;
        ensure!(starting.started().await.is_err(), "StartVM");
        // It may still be listed, as one that is refused.
        scene.node.leaves_nothing(&shim.id).await
    };
    scene.within(test).await?;
    scene.finish().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_that_runs_needs_its_file_no_more() -> Result<()> {
    let scene = Scene::new(PATIENCE).await?;
    let test = async {
        let (replaced, gone) = (scene.node.shim("replaced")?, scene.node.shim("gone")?);
        let (mut first, mut second) = tokio::try_join!(replaced.run(), gone.run())?;
        let other = fs::read(scene.apf_json(&scene.bystander))?;
        let new = scene.node.path("new.json");
        fs::write(&new, other)?;
        fs::rename(&new, scene.apf_json(&replaced))?;
        fs::remove_file(scene.apf_json(&gone))?;
        // Whatever this changes has changed once a pod that was created after it works.
        scene.another_pod_works("next").await?;
        for (shim, runtime) in [(&replaced, &mut first), (&gone, &mut second)] {
            runtime.exchange(BLOCK).await.with_context(|| shim.name.clone())?;
        }
        for (shim, runtime) in [(replaced, first), (gone, second)] {
            shim.end(runtime).await?;
            scene.node.forgets(&shim.id).await?;
        }
        Ok(())
    };
    scene.within(test).await?;
    scene.finish().await
}

#[tokio::test(flavor = "multi_thread")]
async fn the_second_of_two_with_one_server_name_waits() -> Result<()> {
    let scene = Scene::new(PATIENCE).await?;
    let test = async {
        let one = scene.node.shim("twin")?;
        let mut two = one.clone();
        two.id = format!("{}{}", &one.id[..8], &scene.node.shim("twin")?.id[8..]);
        let (first, second) = (one.create_vm().await?, two.create_vm().await?);
        ensure!(scene.node.caa.server_name(&one.id)? == scene.node.caa.server_name(&two.id)?);
        // Only this one lives, so it is meant.
        scene.node.start(&one).await?.started().await?;
        let mut runtime = one.connect(&first).await?;
        let starting = scene.node.start(&two).await?;
        scene.says(0, None, "more than one sandbox has a certificate for this name").await?;
        ensure!(*starting.line.borrow() != Line::Up, "it was guessed which one is meant");
        runtime.exchange(BLOCK).await?;
        one.end(runtime).await?;
        starting.started().await?;
        let mut runtime = two.connect(&second).await?;
        runtime.exchange(BLOCK).await?;
        two.end(runtime).await?;
        scene.node.forgets(&one.id).await?;
        scene.node.forgets(&two.id).await
    };
    scene.within(test).await?;
    scene.finish().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_directory_of_an_unknown_layout_is_reported() -> Result<()> {
    let scene = Scene::new(PATIENCE).await?;
    let test = async {
        let pods = scene.node.caa.directory("");
        fs::write(pods.join("file"), "x")?;
        fs::create_dir_all(pods.join("v2/pods/deep"))?;
        std::os::unix::fs::symlink(pods.join("loop"), pods.join("loop"))?;
        fs::create_dir(pods.join("no id, and a\nline"))?;
        for number in 0..2000 {
            fs::create_dir(pods.join(format!("{number:064x}")))?;
        }
        let layout = scene.node.shim("layout")?;
        let new = pods.join(&layout.id);
        fs::create_dir(&new)?;
        fs::write(new.join("apf.json"), "{\"sandbox\": {\"certificate\": \"x\"}}")?;
        scene.says(0, Some(&layout), "this release of cloud-api-adaptor writes something else").await?;
        scene.another_pod_works("next").await?;
        let lines = scene.serve.lines().len();
        ensure!(lines < 500, "{lines} lines in the log");
        Ok(())
    };
    scene.within(test).await?;
    scene.finish().await
}
