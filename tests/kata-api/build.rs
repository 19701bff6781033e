//! Generates messages, client and server from the proto files.

use std::error::Error;
use std::path::Path;

use ttrpc_codegen::{Codegen, Customize, ProtobufCustomize};

/// One file each; their inner attributes rule out `include!`, so a file that can be included names them.
const MODULES: &str =
    "pub mod agent;\npub mod agent_ttrpc;\npub mod hypervisor;\npub mod hypervisor_ttrpc;\npub mod oci;\n";

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=proto");
    Codegen::new()
        .include("proto")
        .inputs(["proto/oci.proto", "proto/agent.proto", "proto/hypervisor.proto"])
        .rust_protobuf()
        .rust_protobuf_customize(ProtobufCustomize::default().gen_mod_rs(false))
        .customize(Customize { async_all: true, ..Customize::default() })
        .run()?;
    std::fs::write(Path::new(&std::env::var("OUT_DIR")?).join("api.rs"), MODULES)?;
    Ok(())
}
