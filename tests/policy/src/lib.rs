//! Evaluates `deploy/trustee/resource-policy.rego` as Trustee's KBS does: the same interpreter, version, features and rule.

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

/// The policy of this repository.
pub const SHIPPED: &str = include_str!("../../../deploy/trustee/resource-policy.rego");

/// Whether a policy lets a VM read a resource.
///
/// `request` is what the KBS hands over as `data` ([`request`]), `claims` is the attestation token's body.
///
/// # Errors
/// If the policy can't be read, or its evaluation fails: then the KBS refuses as well, with an error.
pub fn allows(policy: &str, request: &Value, claims: &Value) -> Result<bool> {
    let mut engine = regorus::Engine::new();
    engine.add_policy("policy.rego".to_owned(), policy.to_owned()).context("reading the policy")?;
    engine.add_data(regorus::Value::from_json_str(&request.to_string())?)?;
    engine.set_input_json(&claims.to_string())?;
    let answer = engine.eval_rule("data.policy.allow".to_owned()).context("evaluating the policy")?;
    match answer {
        regorus::Value::Bool(allowed) => Ok(allowed),
        other => bail!("the policy answers {other}, not true or false"),
    }
}

/// What the KBS says about a `GET` of `/kbs/v0/resource/<path>`.
pub fn request(path: &str) -> Value {
    json!({ "plugin": "resource", "resource-path": path.split('/').collect::<Vec<_>>(), "query": {} })
}
