//! `GET /`

use axum::response::Html;

const PAGE: &str = "<!doctype html>
<html lang=\"en\">
<head><meta charset=\"utf-8\"><title>ScaleLLM</title></head>
<body>
<h1>ScaleLLM</h1>
<p>This server speaks OpenAI's API.</p>
<ul>
<li>POST /v1/chat/completions, POST /v1/completions</li>
<li>GET <a href=\"/v1/models\">/v1/models</a></li>
<li>POST /tokenize, POST /detokenize</li>
<li>GET <a href=\"/health\">/health</a>, <a href=\"/ready\">/ready</a>, <a href=\"/metrics\">/metrics</a>,
<a href=\"/version\">/version</a>, <a href=\"/openapi.json\">/openapi.json</a></li>
</ul>
</body>
</html>
";

pub async fn index() -> Html<&'static str> {
    Html(PAGE)
}
