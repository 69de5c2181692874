//! `scalellm-gateway --config FILE`: the gateway as a program of its own, without Python.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use scalellm_gateway::{Config, GatewayError, serve};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const USAGE: &str = "usage: scalellm-gateway --config FILE\n       scalellm-gateway --version";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let file = match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["--config", file] => PathBuf::from(file),
        ["--version"] => {
            println!("scalellm-gateway {}", env!("CARGO_PKG_VERSION"));
            return ExitCode::SUCCESS;
        }
        ["--help"] => {
            println!("{USAGE}");
            return ExitCode::SUCCESS;
        }
        _ => {
            eprintln!("{USAGE}");
            return ExitCode::from(2);
        }
    };
    match run(&file) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("scalellm-gateway: {}: {error}", file.display());
            ExitCode::FAILURE
        }
    }
}

fn run(file: &Path) -> Result<(), GatewayError> {
    let text =
        std::fs::read_to_string(file).map_err(|error| GatewayError::Config(error.to_string()))?;
    // A reload finds the file even if the process has gone to another folder.
    let path = file.canonicalize()?;
    serve(Config::read(&text)?, Some(path))
}
