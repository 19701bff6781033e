//! Dials of the VMs' port by others than CAA.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use secure_comms_tests::harness::scene::PATIENCE;
use secure_comms_tests::simulators::caa::FORWARDER_PORT;
use secure_comms_tunnel::netns::Namespace;

use crate::Scene;

/// Metric of refused connections.
const REFUSED: &str = "secure_comms_refused_dials_total";
/// The limit that a test gives one answer.
const ANSWER: Duration = Duration::from_secs(120);

/// A ClientHello of TLS 1.1 without extensions.
fn old_hello() -> Vec<u8> {
    let mut hello = vec![3, 2];
    hello.extend([7; 32]);
    hello.extend([0, 0, 4, 0xc0, 0x09, 0x00, 0x2f, 1, 0]);
    let length = u8::try_from(hello.len()).unwrap();
    let mut message = vec![22, 3, 1, 0, length + 4, 1, 0, 0, length];
    message.extend(hello);
    message
}

impl Scene {
    /// Address that CAA dials for the pod that runs.
    fn forwarder(&self) -> Result<SocketAddr> {
        Ok(SocketAddr::new(self.node.cloud.vm(&self.bystander.id)?.address, FORWARDER_PORT))
    }

    /// Runs clients on the node, in its network namespace.
    async fn on_node<T: Send + 'static>(
        &self,
        clients: impl FnOnce(SocketAddr) -> std::io::Result<T> + Send + 'static,
    ) -> Result<T> {
        let to = self.forwarder()?;
        Ok(Namespace::new(self.node.namespace.name()).run(move || clients(to)).await?)
    }

    async fn refused(&self) -> Result<f64> {
        self.node.metric(REFUSED, "").await
    }
}

/// Sends bytes, and reads until the end; a reset is one.
fn exchange(to: SocketAddr, bytes: &[u8]) -> std::io::Result<Vec<u8>> {
    let mut stream = TcpStream::connect(to)?;
    stream.set_read_timeout(Some(ANSWER))?;
    stream.write_all(bytes)?;
    let mut answer = Vec::new();
    match stream.read_to_end(&mut answer) {
        Err(error) if error.kind() != std::io::ErrorKind::ConnectionReset => Err(error),
        _ => Ok(answer),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_tls_and_an_old_tls_is_refused() -> Result<()> {
    let scene = Scene::new(PATIENCE).await?;
    let test = async {
        for bytes in
            [old_hello(), b"GET / HTTP/1.0\r\n\r\n".to_vec(), vec![0; 70_000], b"SSH-2.0-x\r\n".to_vec()]
        {
            let before = scene.refused().await?;
            let answer = scene.on_node(move |to| exchange(to, &bytes)).await?;
            // An alert at most.
            ensure!(answer.len() <= 7, "answered {answer:?}");
            ensure!(scene.refused().await? > before, "it is not counted");
        }
        Ok(())
    };
    scene.within(test).await?;
    scene.finish().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_port_scanner_disturbs_no_pod() -> Result<()> {
    let scene = Scene::new(PATIENCE).await?;
    let test = async {
        scene
            .on_node(|to| {
                for _ in 0..100 {
                    drop(TcpStream::connect(to)?);
                }
                Ok(())
            })
            .await?;
        scene.another_pod_works("next").await
    };
    scene.within(test).await?;
    scene.finish().await
}

#[tokio::test(flavor = "multi_thread")]
async fn slow_hellos_end_and_disturb_no_pod() -> Result<()> {
    let scene = Scene::new(PATIENCE).await?;
    let test = async {
        let mut slow = scene
            .on_node(|to| {
                let connect = |_| {
                    let mut stream = TcpStream::connect(to)?;
                    stream.write_all(&[22, 3, 1])?;
                    stream.set_read_timeout(Some(ANSWER))?;
                    Ok(stream)
                };
                (0..300).map(connect).collect::<std::io::Result<Vec<_>>>()
            })
            .await?;
        scene.another_pod_works("next").await?;
        // Each is closed by `serve`, although its client would wait.
        let ends = tokio::task::spawn_blocking(move || {
            slow.iter_mut().try_for_each(|stream| match stream.read(&mut [0; 64]) {
                Err(error) if error.kind() != std::io::ErrorKind::ConnectionReset => Err(error),
                _ => Ok(()),
            })
        });
        ends.await?.context("a slow hello is not ended")
    };
    scene.within(test).await?;
    scene.finish().await
}

#[tokio::test(flavor = "multi_thread")]
async fn ten_thousand_dials_of_a_local_process_are_bounded() -> Result<()> {
    let scene = Scene::new(PATIENCE).await?;
    let test = async {
        let before = scene.serve.rss_kib()?;
        let flood = scene.on_node(|to| {
            let mut open = std::collections::VecDeque::new();
            for _ in 0..10_000 {
                // One that is refused or reset is what a flood gets.
                if let Ok(mut stream) = TcpStream::connect(to)
                    && stream.write_all(&old_hello()).is_ok()
                {
                    open.push_back(stream);
                }
                if open.len() > 500 {
                    open.pop_front();
                }
            }
            Ok(())
        });
        let (flooded, works) = tokio::join!(flood, scene.another_pod_works("next"));
        flooded?;
        works?;
        let lines = scene.serve.lines().len();
        ensure!(lines < 1000, "{lines} lines in the log");
        let grown = scene.serve.peak_kib()?.saturating_sub(before);
        ensure!(grown < 64 * 1024, "it grew by {grown} KiB");
        scene.serve.wait_for_files(200, PATIENCE).await
    };
    scene.within(test).await?;
    scene.finish().await
}
