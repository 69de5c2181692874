//! What fuzzers call (`fuzz/`), and tests over the fuzzers' seeds. Each takes any bytes and panics if something is wrong.

use std::path::Path;

pub use crate::client::fuzzing::gateway_side;
pub use crate::listener::fuzzing::engine_side;

/// What a fuzzer calls, by the name of its target.
pub type Target = (&'static str, fn(&[u8]));

/// Gives each target all its seeds.
///
/// # Panics
/// If a target has none, or one of them finds something wrong.
pub fn pass_seeds(targets: &[Target]) {
    let seeds = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/seeds");
    for (name, target) in targets {
        let folder = std::fs::read_dir(seeds.join(name)).expect("a folder of seeds");
        let mut count = 0;
        for seed in folder {
            let seed = seed.expect("a seed").path();
            eprintln!("{}", seed.display());
            target(&std::fs::read(seed).expect("a seed"));
            count += 1;
        }
        assert!(count > 0, "{name} has no seeds");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_seeds_of_every_target_pass() {
        pass_seeds(&[("gateway_side", gateway_side), ("engine_side", engine_side)]);
    }
}
