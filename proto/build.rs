//! Compiles the messages (and, with the `rpc` feature, the gRPC stubs) without a system protoc.

use std::error::Error;

fn main() -> Result<(), Box<dyn Error>> {
    let files: Vec<String> = ["common", "shard", "crossdir", "registry", "block", "log", "storage", "peer"]
        .iter()
        .map(|name| format!("proto/eggs/v1/{name}.proto"))
        .collect();
    println!("cargo:rerun-if-changed=proto");
    let descriptors = protox::compile(&files, ["proto"])?;
    let rpc = std::env::var_os("CARGO_FEATURE_RPC").is_some();
    tonic_prost_build::configure().build_client(rpc).build_server(rpc).bytes(".").compile_fds(descriptors)?;
    Ok(())
}
