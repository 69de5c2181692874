//! `GET /openapi.json`: kept by hand, and checked against the routes.

use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse, Response};

const DOCUMENT: &str = include_str!("openapi.json");

pub async fn openapi() -> Response {
    let kind = HeaderValue::from_static("application/json");
    ([(header::CONTENT_TYPE, kind)], DOCUMENT).into_response()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use serde_json::Value;

    use super::*;
    use crate::routes::{ROUTES, is_admin, is_open};

    fn document() -> Value {
        serde_json::from_str(DOCUMENT).unwrap()
    }

    #[test]
    fn it_has_every_route_and_no_other() {
        let told: BTreeSet<String> = document()["paths"]
            .as_object()
            .unwrap()
            .keys()
            .cloned()
            .collect();
        let served: BTreeSet<String> = ROUTES
            .iter()
            .map(|route| route.replace("{*", "{"))
            .collect();
        assert_eq!(told, served);
        assert_eq!(document()["info"]["version"], env!("CARGO_PKG_VERSION"));
    }

    #[test]
    fn it_tells_which_key_each_route_asks_for() {
        for (path, methods) in document()["paths"].as_object().unwrap() {
            for (method, operation) in methods.as_object().unwrap() {
                let asked = operation["security"][0]
                    .as_object()
                    .and_then(|one| one.keys().next());
                let expected = match path.as_str() {
                    path if is_open(path) => None,
                    path if is_admin(path) => Some("adminKey"),
                    _ => Some("key"),
                };
                assert_eq!(asked.map(String::as_str), expected, "{method} {path}");
            }
        }
    }

    #[test]
    fn its_references_lead_somewhere() {
        fn check(document: &Value, value: &Value) {
            match value {
                Value::Object(map) => {
                    if let Some(Value::String(target)) = map.get("$ref") {
                        let found = document.pointer(target.trim_start_matches('#'));
                        assert!(found.is_some(), "{target}");
                    }
                    map.values().for_each(|value| check(document, value));
                }
                Value::Array(items) => items.iter().for_each(|value| check(document, value)),
                _ => {}
            }
        }
        let document = document();
        check(&document, &document);
    }
}
