//! What fuzzers call (`fuzz/`), and tests over the fuzzers' seeds. Each takes any bytes and panics if something is wrong.

pub use crate::client::fuzzing::gateway_side;
pub use crate::listener::fuzzing::engine_side;

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn the_seeds_of_every_target_pass() {
        type Target = (&'static str, fn(&[u8]));
        let targets: [Target; 2] = [("gateway_side", gateway_side), ("engine_side", engine_side)];
        for (name, target) in targets {
            let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/seeds");
            let seeds: Vec<_> = std::fs::read_dir(folder.join(name)).unwrap().collect();
            assert!(!seeds.is_empty(), "{name} has no seeds");
            for seed in seeds {
                let seed = seed.unwrap().path();
                eprintln!("{}", seed.display());
                target(&std::fs::read(seed).unwrap());
            }
        }
    }
}
