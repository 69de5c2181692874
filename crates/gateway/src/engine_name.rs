//! What clients are told of an engine in the place of its address, which is for operators alone.

use scalellm_routing::stable_hash;

/// The same name for the same address, in every gateway and after every change of the configuration; `/admin/v1/replicas`
/// tells whose it is.
#[must_use]
pub fn engine_name(kind: &str, address: &str) -> String {
    format!("{kind}-{:06x}", stable_hash(address.as_bytes()) & 0xff_ffff)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_stays_and_does_not_tell_the_address() {
        let name = engine_name("replica", "10.0.0.7:9000");
        assert_eq!(name, engine_name("replica", "10.0.0.7:9000"));
        assert_ne!(name, engine_name("replica", "10.0.0.8:9000"));
        assert_eq!(name.len(), "replica-".len() + 6);
        assert!(!name.contains("10.0"), "{name}");
    }
}
