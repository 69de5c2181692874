//! `scalellm-fake-engine ADDRESS [SETTINGS_JSON]`

use std::io::Write;
use std::process::ExitCode;

use scalellm_engine_link::Address;
use scalellm_fake_engine::{FakeEngine, Settings};

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    let Some(address) = arguments.next() else {
        eprintln!("usage: scalellm-fake-engine ADDRESS [SETTINGS_JSON]");
        return ExitCode::from(2);
    };
    let settings = arguments.next().unwrap_or_else(|| "{}".to_owned());
    match serve(&address, &settings) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("scalellm-fake-engine: {error}");
            ExitCode::FAILURE
        }
    }
}

fn serve(address: &str, settings: &str) -> Result<(), Box<dyn std::error::Error>> {
    let address: Address = address.parse()?;
    let engine = FakeEngine::start(&address, Settings::from_json(settings)?)?;
    println!("ready {}", engine.address());
    std::io::stdout().flush()?;
    while !engine.is_over() {
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
    Ok(())
}
