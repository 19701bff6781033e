//! `inspector --socket PATH`

use std::path::Path;

use anyhow::{Context, Result};
use secure_comms_simulators::args::{Args, until_signal};
use secure_comms_simulators::inspector::Inspector;

pub(super) async fn serve(args: Vec<String>) -> Result<()> {
    let args = Args::parse(args, &["socket"])?;
    let path = args.get("socket").context("inspector: --socket PATH is missing")?;
    let _inspector = Inspector::start(Path::new(path))?;
    println!("listening on {path}");
    until_signal().await
}
