//! Personal data by their form, and by their check digits where they have some.

use super::look_back::{Rule, bounded};
use crate::config::safety::PersonalKind;

/// What finds one kind.
///
/// # Errors
/// None, as a test says.
pub fn rule(kind: PersonalKind) -> Result<Rule, String> {
    let (pattern, judge, mask): (_, fn(&str) -> Option<usize>, _) = match kind {
        PersonalKind::Email => (EMAIL, all, "[EMAIL]"),
        PersonalKind::Iban => (IBAN, iban, "[IBAN]"),
        PersonalKind::Card => (CARD, card, "[CARD]"),
        PersonalKind::Phone => (PHONE, all, "[PHONE]"),
    };
    Rule::new(vec![bounded(pattern)?], judge, mask.to_owned())
}

/// A local part of up to 64 characters, and a domain with a dot in it.
const EMAIL: &str = r"(?i-u:[a-z0-9.!#$%&'*+/=?^_`{|}~-]{1,64}@(?:[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?\.){1,6}[a-z]{2,24})";
/// Country, check digits, and up to 30 characters in groups.
const IBAN: &str = r"(?i)\b(?-u:[a-z]{2}[0-9]{2}(?:[ -]?[a-z0-9]){11,30})\b";
/// 13 to 19 digits, perhaps in groups.
const CARD: &str = r"\b(?-u:[0-9](?:[ -]?[0-9]){12,18})\b";
/// With a country's code, or in the form of North America.
const PHONE: &str = r"(?:(?-u:\+|\b00)(?-u:[1-9](?:[ ./()-]{0,2}[0-9]){6,14})|(?-u:\([2-9][0-9]{2}\) ?|\b[2-9][0-9]{2}[-. ])(?-u:[2-9][0-9]{2}[-. ][0-9]{4}))";

fn all(text: &str) -> Option<usize> {
    Some(text.len())
}

/// The longest beginning that ends where a group does, has 13 to 19 digits, and passes Luhn's test (ISO/IEC 7812-1).
fn card(text: &str) -> Option<usize> {
    let digits: Vec<(usize, u8)> = text
        .bytes()
        .enumerate()
        .filter(|(_, byte)| byte.is_ascii_digit())
        .collect();
    (13..=digits.len()).rev().find_map(|count| {
        let end = digits[count - 1].0 + 1;
        let goes_on = text.as_bytes().get(end).is_some_and(u8::is_ascii_digit);
        let number = digits[..count].iter().map(|(_, byte)| byte - b'0');
        (!goes_on && luhn(number.rev())).then_some(end)
    })
}

/// Luhn's test of digits from the last to the first.
fn luhn(digits: impl Iterator<Item = u8>) -> bool {
    let mut any = 0;
    let sum: u32 = digits
        .enumerate()
        .map(|(place, digit)| {
            any |= digit;
            match (place % 2, digit) {
                (0, digit) => u32::from(digit),
                (_, digit @ 5..) => u32::from(digit) * 2 - 9,
                (_, digit) => u32::from(digit) * 2,
            }
        })
        .sum();
    any > 0 && sum.is_multiple_of(10)
}

/// The beginning that is as long as the country's numbers are, if its check digits are right (ISO 13616).
fn iban(text: &str) -> Option<usize> {
    let country = text.get(..2)?.to_ascii_uppercase();
    let mut lengths = IBAN_LENGTHS.split_whitespace();
    let length: usize = lengths.find_map(|entry| entry.strip_prefix(&*country)?.parse().ok())?;
    let characters = text
        .bytes()
        .enumerate()
        .filter(|(_, byte)| byte.is_ascii_alphanumeric());
    let (end, _) = characters.clone().nth(length - 1)?;
    if text
        .as_bytes()
        .get(end + 1)
        .is_some_and(u8::is_ascii_alphanumeric)
    {
        return None;
    }
    let number: Vec<u8> = characters.take(length).map(|(_, byte)| byte).collect();
    let rearranged = number[4..].iter().chain(&number[..4]);
    let remainder = rearranged.fold(0_u32, |rest, byte| match byte {
        b'0'..=b'9' => (rest * 10 + u32::from(byte - b'0')) % 97,
        letter => (rest * 100 + u32::from(letter.to_ascii_uppercase() - b'A') + 10) % 97,
    });
    (remainder == 1).then_some(end + 1)
}

/// Characters of an IBAN, by country (SWIFT's IBAN registry).
const IBAN_LENGTHS: &str = "\
    AD24 AE23 AL28 AT20 AZ28 BA20 BE16 BG22 BH22 BI27 BR29 BY28 CH21 CR22 CY28 CZ24 DE22 DJ27 \
    DK18 DO28 EE20 EG29 ES24 FI18 FK18 FO18 FR27 GB22 GE22 GI23 GL18 GR27 GT28 HN28 HR21 HU28 \
    IE22 IL23 IQ23 IS26 IT27 JO30 KW30 KZ20 LB28 LC32 LI21 LT20 LU20 LV21 LY25 MC27 MD24 ME22 \
    MK19 MN20 MR27 MT31 MU30 NI28 NL18 NO15 OM23 PK24 PL28 PS29 PT25 QA29 RO24 RS22 RU33 SA24 \
    SC31 SD18 SE24 SI19 SK24 SM27 SO23 ST25 SV28 TL23 TN24 TR26 UA29 VA22 VG24 XK20 YE30";

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::safety::look_back::LookBack;

    fn masked(pieces: &[&str]) -> String {
        let mut text: Vec<String> = pieces.iter().map(|piece| (*piece).to_owned()).collect();
        for kind in PersonalKind::ALL {
            let rule = rule(kind).unwrap();
            let mut held = LookBack::default();
            let last = text.len() - 1;
            for (index, piece) in text.iter_mut().enumerate() {
                let mut out = String::new();
                held.push(&rule, piece, index == last, &mut out, |_| true);
                *piece = out;
            }
        }
        text.concat()
    }

    #[test]
    fn each_kind_is_found_in_a_text() {
        for (text, out) in [
            ("Mail jo.do+x@mail.example.co.uk, now", "Mail [EMAIL], now"),
            ("<a_b@example.com>", "<[EMAIL]>"),
            (
                "pay DE89 3704 0044 0532 0130 00 AND go",
                "pay [IBAN] AND go",
            ),
            ("GB82WEST12345698765432.", "[IBAN]."),
            ("no15 is NO9386011117947 ok", "no15 is [IBAN] ok"),
            ("4111 1111 1111 1111 12/27", "[CARD] 12/27"),
            ("5500-0000-0000-0004,378282246310005", "[CARD],[CARD]"),
            ("1 4111111111111111", "1 [CARD]"),
            (
                "call +49 (0)30 123456-78 or 0044 20 7946 0958",
                "call [PHONE] or [PHONE]",
            ),
            ("(415) 555-2671 and 415.555.2671", "[PHONE] and [PHONE]"),
        ] {
            assert_eq!(masked(&[text]), out);
        }
    }

    #[test]
    fn what_only_looks_like_one_stays() {
        for text in [
            "a@b and user@localhost, @home",
            "DE11 2222 3333 4444 5555 66",
            "XX11 2222 3333 4444 5555 66",
            "4111 1111 1111 1112",
            "0000 0000 0000 0000",
            "id 12345678901234567890123",
            "2026-11-21 10:20:30, 1.234.567,89, 192.168.100.200",
            "3.14159265358979 and 1/2/3",
        ] {
            assert_eq!(masked(&[text]), text);
        }
    }

    proptest! {
        #[test]
        fn cuts_do_not_matter(
            parts in proptest::collection::vec(prop_oneof![
                Just("a.b@c.de"), Just("@"), Just(" "), Just("DE89 3704 0044 0532 0130 00"), Just("4111 1111 1111 1111"),
                Just("+49 30 123456"), Just("7"), Just("x"), Just("é"), Just("."), Just("-")], 0..12),
            cuts in proptest::collection::vec(0..120_usize, 0..30),
        ) {
            let text = parts.concat();
            let mut at: Vec<usize> = cuts.into_iter().filter(|cut| text.is_char_boundary(*cut)).collect();
            at.extend([0, text.len()]);
            at.sort_unstable();
            let pieces: Vec<&str> = at.windows(2).map(|w| &text[w[0]..w[1]]).collect();
            prop_assert_eq!(masked(&pieces), masked(&[&text]));
        }
    }
}
