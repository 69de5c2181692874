//! Names of blocks and of replicas that are the same on every machine.

use blake2b_simd::Params;

/// Names a block and everything before it.
pub type BlockHash = [u8; 16];

/// Hashes of a prompt's full blocks: each BLAKE2b-128 over the parent's hash (16 zero bytes for the first), one
/// length byte of the salt, the salt, and the block's ids as little-endian 32 bit, as engine.proto's KvEvents say.
#[must_use]
pub fn block_hashes(ids: &[u32], block_size: usize, salt: &[u8]) -> Vec<BlockHash> {
    if block_size == 0 {
        return Vec::new();
    }
    // Longer salts are refused before they get here; the engine would not find them.
    let length = u8::try_from(salt.len()).unwrap_or(u8::MAX);
    let mut parameters = Params::new();
    parameters.hash_length(size_of::<BlockHash>());
    let mut parent = BlockHash::default();
    let mut content = Vec::with_capacity(parent.len() + 1 + salt.len() + 4 * block_size);
    ids.chunks_exact(block_size)
        .map(|block| {
            content.clear();
            content.extend_from_slice(&parent);
            content.push(length);
            content.extend_from_slice(salt);
            content.extend(block.iter().flat_map(|id| id.to_le_bytes()));
            parent.copy_from_slice(parameters.hash(&content).as_bytes());
            parent
        })
        .collect()
}

/// FNV-1a (Fowler, Noll, Vo) of some bytes, mixed: not for secrets, and the same everywhere.
#[must_use]
pub fn stable_hash(bytes: &[u8]) -> u64 {
    let hash = bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3)
    });
    mix(hash)
}

/// A number for some bytes after what `before` is the number of, several bytes a cycle: for tables of one process, not
/// for secrets. One folded multiplication for 16 bytes, as in wyhash (Wang Yi).
pub(crate) fn hash_after(before: u64, bytes: &[u8]) -> u64 {
    let (pairs, rest) = bytes.as_chunks::<16>();
    let mut last = [0; 16];
    last[..rest.len()].copy_from_slice(rest);
    let first = mix(before) ^ bytes.len() as u64;
    let folded = pairs.iter().fold(first, |hash, pair| fold(hash, *pair));
    mix(fold(folded, last))
}

fn fold(hash: u64, pair: [u8; 16]) -> u64 {
    let pair = u128::from_le_bytes(pair);
    let (low, high) = (pair as u64, (pair >> 64) as u64);
    let product = u128::from(low ^ 0xe703_7ed1_a0b4_28db) * u128::from(high ^ hash);
    (product as u64) ^ (product >> 64) as u64
}

/// The finaliser of SplitMix64 (Steele, Lea, Flood 2014).
pub(crate) fn mix(mut x: u64) -> u64 {
    x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// From Python: `hashlib.blake2b(parent + bytes((len(salt),)) + salt + ids, digest_size=16)`.
    #[test]
    fn hashes_are_those_of_the_engine() {
        let hashes = block_hashes(&[1, 2, 3, 4, 5, 6, 7, 8, 9], 4, b"tenant");
        let hex: Vec<String> = hashes
            .iter()
            .map(|hash| hash.iter().map(|byte| format!("{byte:02x}")).collect())
            .collect();
        assert_eq!(
            hex,
            [
                "e447d1d341138e4839107984ddd264f6",
                "23bb976f0997fc83f5d72a68f1ea6e2a"
            ]
        );
    }

    #[test]
    fn every_byte_and_what_was_before_it_changes_the_number() {
        let bytes: Vec<u8> = (0..100).collect();
        let mut seen = std::collections::BTreeSet::new();
        for before in 0..3 {
            for end in 0..=bytes.len() {
                assert!(seen.insert(hash_after(before, &bytes[..end])));
            }
            for at in 0..bytes.len() {
                let mut other = bytes.clone();
                other[at] ^= 1;
                assert!(seen.insert(hash_after(before, &other)));
            }
        }
    }

    #[test]
    fn a_hash_names_everything_before_it() {
        let of = |ids: &[u32]| block_hashes(ids, 2, b"");
        assert_eq!(of(&[1, 2, 3, 4])[0], of(&[1, 2, 5, 6])[0]);
        assert_ne!(of(&[1, 2, 3, 4])[1], of(&[9, 2, 3, 4])[1]);
        assert_ne!(
            block_hashes(&[1, 2], 2, b"a"),
            block_hashes(&[1, 2], 2, b"b")
        );
        assert!(block_hashes(&[1, 2], 0, b"").is_empty());
        assert!(of(&[1]).is_empty());
    }
}
