//! Who answers a request: the replicas here, or the upstreams of its model.

use std::sync::Arc;

use axum::http::HeaderMap;
use axum::response::Response;

use super::asked::Asked;
use super::beside::Turn;
use super::exchange::InFlight;
use super::relay::{Endpoint, Relay};
use crate::app::App;
use crate::body::{self, ReadBody, Reading};
use crate::error::{ApiError, ApiResult};
use crate::record::RequestRecord;
use crate::stages::Stage;

/// Where a request went.
pub enum Way<T> {
    /// An upstream answered.
    Elsewhere(Response),
    /// The replicas here are to answer what the body came to; counted as theirs where upstreams could have got it.
    Here(T, Option<InFlight>),
}

/// Has a request answered by an upstream, or makes of it what the replicas here take.
///
/// # Errors
/// The request is refused, or no upstream answers it.
pub async fn way<T: Send + 'static>(
    app: &Arc<App>,
    record: &Arc<RequestRecord>,
    endpoint: Endpoint,
    headers: &HeaderMap,
    body: &ReadBody<'_>,
    take: impl FnOnce(&[u8]) -> ApiResult<T> + Send + 'static,
) -> ApiResult<Way<T>> {
    let mut here = None;
    if let Some((mut relay, own_is_ready)) = relay(app, record, endpoint, headers, body).await? {
        match relay.turn(own_is_ready) {
            Turn::Replicas(turn) => here = Some((relay, turn)),
            Turn::Upstreams(chosen) => {
                relay.chosen = chosen;
                let answer = relay.run().await;
                if !relay.goes_to_replicas() {
                    return answer.map(Way::Elsewhere);
                }
                let turn = relay.model.for_replicas();
                here = Some((relay, turn));
            }
        }
    }
    let taken = body::parse(app, record, &body.bytes, Reading::Whole, take).await;
    match (taken, here) {
        // Tools, say: an upstream may know what to do.
        (Err(refusal), Some((mut relay, turn)))
            if is_unsupported(&refusal) && !relay.unanswered && relay.model.is_ready() =>
        {
            drop(turn);
            relay.run().await.map(Way::Elsewhere)
        }
        (taken, here) => {
            let taken = taken?;
            let turn = here.map(|(relay, turn)| {
                relay.model.replicas_take(&relay.prompt);
                turn
            });
            Ok(Way::Here(taken, turn))
        }
    }
}

/// The request as upstreams get it, if they may be to answer it, and whether replicas could.
async fn relay<'a>(
    app: &'a Arc<App>,
    record: &'a Arc<RequestRecord>,
    endpoint: Endpoint,
    headers: &'a HeaderMap,
    body: &ReadBody<'_>,
) -> ApiResult<Option<(Relay<'a>, bool)>> {
    let live = app.live();
    if !live.fleet.has_foreign() {
        return Ok(None);
    }
    let asked = body::parse(app, record, &body.bytes, Reading::Scan, Asked::read).await?;
    let Some((model, own_is_ready)) = live.fleet.foreign(asked.model.as_deref())? else {
        return Ok(None);
    };
    // Of what the client sent: hooks that change it change equal beginnings equally.
    let prompt = record.timed(Stage::Route, || model.prefixes(&asked, &body.bytes));
    let relay = Relay {
        app,
        record,
        endpoint,
        headers,
        model: Arc::clone(model),
        asked,
        body: body.bytes.clone(),
        prompt,
        chosen: None,
        deadline: None,
        unanswered: false,
    };
    Ok(Some((relay, own_is_ready)))
}

fn is_unsupported(refusal: &ApiError) -> bool {
    refusal.code == Some("unsupported_field")
}
