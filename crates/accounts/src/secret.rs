//! API keys as clients hold them: `sk-scale-` and 48 characters, of which the last six are a checksum.
//!
//! A key has 250 bits of randomness, so its plain SHA-256 is as good as a slow hash: there is nothing to guess. The
//! checksum lets the gateway refuse what is not a key of ours without asking the database.

use std::fmt::Write as _;

use rand::RngExt as _;
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

const PREFIX: &str = "sk-scale-";
const ALPHABET: &[u8; 62] = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";
const RANDOM_CHARS: usize = 42;
const CHECK_CHARS: usize = 6;
/// What lists show of a key.
const SHOWN_CHARS: usize = PREFIX.len() + 5;

/// SHA-256 of a key, all that is stored of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct SecretHash([u8; 32]);

impl SecretHash {
    /// Of a key that a client sent; `None` if it cannot be one of ours.
    #[must_use]
    pub fn of(secret: &str) -> Option<SecretHash> {
        let (body, check) = secret
            .strip_prefix(PREFIX)?
            .split_at_checked(RANDOM_CHARS)?;
        (check.len() == CHECK_CHARS && check == checksum(body))
            .then(|| SecretHash(Sha256::digest(secret.as_bytes()).into()))
    }

    #[must_use]
    pub fn hex(&self) -> String {
        let mut text = String::with_capacity(64);
        for byte in self.0 {
            // Writing to a String cannot fail.
            let _ = write!(text, "{byte:02x}");
        }
        text
    }

    /// In a time that tells nothing of either.
    #[must_use]
    pub fn equals(&self, other: &SecretHash) -> bool {
        self.0.ct_eq(&other.0).into()
    }
}

/// A new key: the secret, to be shown once, and what lists show of it.
#[must_use]
pub fn new_secret() -> (String, String) {
    let mut rng = rand::rng();
    let body: String = (0..RANDOM_CHARS)
        .map(|_| char::from(ALPHABET[rng.random_range(0..ALPHABET.len())]))
        .collect();
    let secret = format!("{PREFIX}{body}{}", checksum(&body));
    let shown = format!("{}...", &secret[..SHOWN_CHARS]);
    (secret, shown)
}

fn checksum(body: &str) -> String {
    let digest = Sha256::digest(body.as_bytes());
    digest
        .iter()
        .take(CHECK_CHARS)
        .map(|byte| char::from(ALPHABET[usize::from(*byte) % ALPHABET.len()]))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_new_key_is_recognised_and_no_other() {
        let (secret, shown) = new_secret();
        let (other, _) = new_secret();
        let hash = SecretHash::of(&secret).unwrap();
        assert_ne!(secret, other);
        assert!(hash.equals(&SecretHash::of(&secret).unwrap()));
        assert!(!hash.equals(&SecretHash::of(&other).unwrap()));
        assert_eq!(hash.hex().len(), 64);
        assert!(secret.starts_with(shown.trim_end_matches('.')));
    }

    #[test]
    fn what_cannot_be_a_key_has_no_hash() {
        let (secret, _) = new_secret();
        let wrong_check = format!("{}!", &secret[..secret.len() - 1]);
        for bad in [
            "",
            "sk-scale-",
            "alpha",
            "sk-scale-\u{e9}",
            &wrong_check,
            &secret[..30],
        ] {
            assert_eq!(SecretHash::of(bad), None, "{bad:?}");
        }
        assert_eq!(SecretHash::of(&format!("{secret}0")), None);
    }
}
