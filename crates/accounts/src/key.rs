//! What a key allows.

use serde::de::{DeserializeOwned, Error as _};
use serde::{Deserialize, Deserializer, Serialize};

use crate::error::{AccountsError, Result};

/// Who goes first when not everybody can go at once.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize,
)]
#[serde(rename_all = "lowercase")]
pub enum Class {
    Interactive,
    #[default]
    Standard,
    Batch,
}

impl Class {
    pub const ALL: [Class; 3] = [Class::Interactive, Class::Standard, Class::Batch];

    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Class::Interactive => "interactive",
            Class::Standard => "standard",
            Class::Batch => "batch",
        }
    }

    #[must_use]
    pub fn from_name(name: &str) -> Option<Class> {
        Class::ALL.into_iter().find(|class| class.name() == name)
    }
}

/// A budget that a key may have. The order is that in which a request reserves them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Quota {
    Concurrency,
    RequestsPerMinute,
    TokensPerMinute,
    TokensPerDay,
    TokensPerMonth,
}

impl Quota {
    pub const ALL: [Quota; 5] = [
        Quota::Concurrency,
        Quota::RequestsPerMinute,
        Quota::TokensPerMinute,
        Quota::TokensPerDay,
        Quota::TokensPerMonth,
    ];
    pub const OF_TOKENS: [Quota; 3] = [
        Quota::TokensPerMinute,
        Quota::TokensPerDay,
        Quota::TokensPerMonth,
    ];

    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Quota::Concurrency => "concurrency",
            Quota::RequestsPerMinute => "requests_per_minute",
            Quota::TokensPerMinute => "tokens_per_minute",
            Quota::TokensPerDay => "tokens_per_day",
            Quota::TokensPerMonth => "tokens_per_month",
        }
    }
}

/// Absent is without limit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    pub concurrency: Option<i64>,
    pub requests_per_minute: Option<i64>,
    pub tokens_per_minute: Option<i64>,
    pub tokens_per_day: Option<i64>,
    pub tokens_per_month: Option<i64>,
}

impl Limits {
    #[must_use]
    pub const fn of(&self, quota: Quota) -> Option<i64> {
        match quota {
            Quota::Concurrency => self.concurrency,
            Quota::RequestsPerMinute => self.requests_per_minute,
            Quota::TokensPerMinute => self.tokens_per_minute,
            Quota::TokensPerDay => self.tokens_per_day,
            Quota::TokensPerMonth => self.tokens_per_month,
        }
    }
}

/// A key as it is stored, without its secret.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Key {
    pub id: String,
    /// The secret's first characters.
    pub shown: String,
    pub name: String,
    /// Whose key it is: tenants share the places for requests fairly.
    pub tenant: String,
    pub class: Class,
    /// Of its tenant's share of the places for requests.
    pub weight: i64,
    /// `None` allows every served model.
    pub models: Option<Vec<String>>,
    pub limits: Limits,
    pub created_at_ms: i64,
    pub expires_at_ms: Option<i64>,
    pub revoked_at_ms: Option<i64>,
}

/// Not from a list, which would be taken for the fields in their order.
fn object<'de, T: DeserializeOwned, D: Deserializer<'de>>(
    deserializer: D,
) -> std::result::Result<T, D::Error> {
    let map = serde_json::Map::deserialize(deserializer)?;
    serde_json::from_value(map.into()).map_err(D::Error::custom)
}

/// What a new key is to be.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct NewKey {
    pub name: String,
    pub tenant: String,
    pub class: Class,
    pub weight: i64,
    pub models: Option<Vec<String>>,
    #[serde(deserialize_with = "object")]
    pub limits: Limits,
    pub expires_in_s: Option<i64>,
}

impl Default for NewKey {
    fn default() -> Self {
        NewKey {
            name: String::new(),
            tenant: "default".to_owned(),
            class: Class::Standard,
            weight: 1,
            models: None,
            limits: Limits::default(),
            expires_in_s: None,
        }
    }
}

/// Keeps sums of limits far from the end of an i64.
const MAX_LIMIT: i64 = 1 << 53;
const MAX_NAME_BYTES: usize = 256;
const MAX_MODELS: usize = 256;
const MAX_WEIGHT: i64 = 1000;
const MAX_LIFE_S: i64 = 100 * 366 * 24 * 3600;

impl NewKey {
    /// # Errors
    /// `Invalid` names the field, what it got and what is allowed.
    pub fn validate(&self) -> Result<()> {
        let bad = |message: String| Err(AccountsError::Invalid(message));
        for (field, text, least) in [("name", &self.name, 0), ("tenant", &self.tenant, 1)] {
            if !(least..=MAX_NAME_BYTES).contains(&text.len()) || text.chars().any(char::is_control)
            {
                return bad(format!(
                    "{field}: got {} bytes, allowed are {least} to {MAX_NAME_BYTES} without control characters",
                    text.len()
                ));
            }
        }
        if !(1..=MAX_WEIGHT).contains(&self.weight) {
            return bad(format!(
                "weight: got {}, allowed is 1 to {MAX_WEIGHT}",
                self.weight
            ));
        }
        if let Some(models) = &self.models
            && (models.is_empty()
                || models.len() > MAX_MODELS
                || models
                    .iter()
                    .any(|m| m.is_empty() || m.len() > MAX_NAME_BYTES))
        {
            return bad(format!(
                "models: got {} names, allowed are 1 to {MAX_MODELS}, each of 1 to {MAX_NAME_BYTES} bytes; null allows every model",
                models.len()
            ));
        }
        for quota in Quota::ALL {
            if let Some(limit) = self.limits.of(quota)
                && !(0..=MAX_LIMIT).contains(&limit)
            {
                return bad(format!(
                    "limits.{}: got {limit}, allowed is 0 to {MAX_LIMIT}, or null for no limit",
                    quota.name()
                ));
            }
        }
        if let Some(life_s) = self.expires_in_s
            && !(1..=MAX_LIFE_S).contains(&life_s)
        {
            return bad(format!(
                "expires_in_s: got {life_s}, allowed is 1 to {MAX_LIFE_S}"
            ));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_key_cannot_be_is_named() {
        let ok = NewKey::default();
        assert!(ok.validate().is_ok());
        let limits = Limits {
            tokens_per_day: Some(-1),
            ..Limits::default()
        };
        for (bad, field) in [
            (
                NewKey {
                    tenant: String::new(),
                    ..ok.clone()
                },
                "tenant",
            ),
            (
                NewKey {
                    name: "a\nb".to_owned(),
                    ..ok.clone()
                },
                "name",
            ),
            (
                NewKey {
                    weight: 0,
                    ..ok.clone()
                },
                "weight",
            ),
            (
                NewKey {
                    models: Some(Vec::new()),
                    ..ok.clone()
                },
                "models",
            ),
            (
                NewKey {
                    limits,
                    ..ok.clone()
                },
                "limits.tokens_per_day",
            ),
            (
                NewKey {
                    expires_in_s: Some(0),
                    ..ok.clone()
                },
                "expires_in_s",
            ),
        ] {
            let message = bad.validate().unwrap_err().to_string();
            assert!(message.starts_with(field), "{message}");
        }
    }
}
