//! The stand-alone program.

use std::process::Command;

const PROGRAM: &str = env!("CARGO_BIN_EXE_scalellm-gateway");

#[test]
fn what_is_wrong_with_its_arguments_or_file_is_told() {
    let usage = Command::new(PROGRAM).output().unwrap();
    assert_eq!(usage.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&usage.stderr).contains("--config FILE"));
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("gateway.toml");
    std::fs::write(
        &file,
        "[[models]]\nname = 'm'\n[[models.upstreams]]\nurl = 'x'\n",
    )
    .unwrap();
    let bad = Command::new(PROGRAM)
        .arg("--config")
        .arg(&file)
        .output()
        .unwrap();
    assert_eq!(bad.status.code(), Some(1));
    let told = String::from_utf8_lossy(&bad.stderr).into_owned();
    assert!(
        told.contains("gateway.toml") && told.contains("models[0].upstreams[0].url: got \"x\""),
        "{told}"
    );
    let version = Command::new(PROGRAM).arg("--version").output().unwrap();
    assert_eq!(
        String::from_utf8_lossy(&version.stdout),
        format!("scalellm-gateway {}\n", env!("CARGO_PKG_VERSION"))
    );
}
