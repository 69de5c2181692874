//! Compiles the contract between gateway and engine, without protoc.

use std::error::Error;

fn main() -> Result<(), Box<dyn Error>> {
    let include = "../../proto";
    let contract = "../../proto/scalellm/engine/v1/engine.proto";
    println!("cargo::rerun-if-changed={contract}");
    println!("cargo::rerun-if-changed=build.rs");
    let descriptors = protox::compile([contract], [include])?;
    tonic_prost_build::configure()
        .boxed(".scalellm.engine.v1.ToEngine.message.submit")
        .compile_fds(descriptors)?;
    Ok(())
}
