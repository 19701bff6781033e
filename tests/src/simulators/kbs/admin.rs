//! The admin's key and the check of admin tokens (JWT, EdDSA).

use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, anyhow};
use base64ct::{Base64, Base64UrlUnpadded, Encoding};
use ring::rand::{SecureRandom, SystemRandom};
use ring::signature::{ED25519, Ed25519KeyPair, KeyPair, UnparsedPublicKey};
use serde_json::{Value, json};

/// PKCS#8 v1 around an Ed25519 seed (RFC 8410 section 7): the form that `openssl genpkey` writes and operators
/// therefore have. ring would write v2, which some parsers refuse.
const PKCS8_PREFIX: [u8; 16] =
    [0x30, 0x2e, 0x02, 0x01, 0x00, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x04, 0x22, 0x04, 0x20];

/// The key pair of the KBS's admin.
pub(super) struct AdminKey {
    pair: Ed25519KeyPair,
    pem: String,
}

impl AdminKey {
    /// Generates a key.
    pub(super) fn generate() -> Result<Self> {
        let mut seed = [0; 32];
        SystemRandom::new().fill(&mut seed).map_err(|_| anyhow!("KBS: no randomness for the admin key"))?;
        let pair = Ed25519KeyPair::from_seed_unchecked(&seed)
            .map_err(|e| anyhow!("KBS: making the admin key: {e}"))?;
        let der = [PKCS8_PREFIX.as_slice(), &seed].concat();
        // 48 bytes make one line of 64 characters.
        let pem = format!(
            "-----BEGIN PRIVATE KEY-----\n{}\n-----END PRIVATE KEY-----\n",
            Base64::encode_string(&der)
        );
        Ok(Self { pair, pem })
    }

    /// The private key as PKCS#8 PEM.
    pub(super) fn pem(&self) -> &str {
        &self.pem
    }

    /// A token with these claims.
    pub(super) fn sign(&self, claims: &Value) -> String {
        let part = |value: &Value| Base64UrlUnpadded::encode_string(value.to_string().as_bytes());
        let signed = format!("{}.{}", part(&json!({"alg": "EdDSA", "typ": "JWT"})), part(claims));
        let signature = self.pair.sign(signed.as_bytes());
        format!("{signed}.{}", Base64UrlUnpadded::encode_string(signature.as_ref()))
    }

    /// Whether `token` is an admin's, seen at `now` in seconds since 1970, or why not.
    pub(super) fn verify(&self, token: &str, now: u64) -> Result<()> {
        let (signed, signature) = token.rsplit_once('.').context("the token is not a JWT")?;
        let (header, claims) = signed.split_once('.').context("the token is not a JWT")?;
        let header = json_part(header)?;
        if header.get("alg") != Some(&json!("EdDSA")) {
            return Err(anyhow!("the token's alg is not EdDSA"));
        }
        let signature =
            Base64UrlUnpadded::decode_vec(signature).map_err(|e| anyhow!("the signature: {e}"))?;
        UnparsedPublicKey::new(&ED25519, self.pair.public_key().as_ref())
            .verify(signed.as_bytes(), &signature)
            .map_err(|_| anyhow!("the token's signature is not the admin's"))?;
        check_claims(&json_part(claims)?, now)
    }
}

fn check_claims(claims: &Value, now: u64) -> Result<()> {
    // As Trustee v0.18 to v0.20 do when no audience is configured.
    if claims.get("aud").is_some() {
        return Err(anyhow!("InvalidAudience: no audience is configured, so a token must not have one"));
    }
    let exp =
        claims.get("exp").and_then(Value::as_u64).context("exp is missing or not in integer seconds")?;
    if exp <= now {
        return Err(anyhow!("ExpiredSignature"));
    }
    if claims.get("role") != Some(&json!("admin")) {
        return Err(anyhow!("the token's role is not admin"));
    }
    Ok(())
}

fn json_part(part: &str) -> Result<Value> {
    let bytes =
        Base64UrlUnpadded::decode_vec(part).map_err(|e| anyhow!("the token is not base64url: {e}"))?;
    serde_json::from_slice(&bytes).context("the token is not JSON")
}

/// Seconds since 1970.
pub(super) fn now() -> Result<u64> {
    Ok(SystemTime::now().duration_since(UNIX_EPOCH).context("the clock stands before 1970")?.as_secs())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(claims: &Value) -> String {
        let key = AdminKey::generate().unwrap();
        key.verify(&key.sign(claims), now().unwrap()).unwrap_err().to_string()
    }

    #[test]
    fn a_token_with_role_and_expiry_is_accepted() {
        let key = AdminKey::generate().unwrap();
        let now = now().unwrap();
        key.verify(&key.sign(&json!({"role": "admin", "exp": now + 60})), now).unwrap();
    }

    #[test]
    fn a_token_with_an_audience_is_refused() {
        let exp = now().unwrap() + 60;
        assert!(refusal(&json!({"role": "admin", "exp": exp, "aud": "kbs"})).contains("InvalidAudience"));
    }

    #[test]
    fn a_token_without_a_valid_expiry_is_refused() {
        let now = now().unwrap();
        assert!(refusal(&json!({"role": "admin"})).contains("exp is missing"));
        assert!(refusal(&json!({"role": "admin", "exp": now as f64 + 60.5})).contains("exp is missing"));
        assert!(refusal(&json!({"role": "admin", "exp": now - 1})).contains("ExpiredSignature"));
    }

    #[test]
    fn a_token_of_another_role_or_another_key_is_refused() {
        let exp = now().unwrap() + 60;
        assert!(refusal(&json!({"role": "user", "exp": exp})).contains("role is not admin"));
        let stranger = AdminKey::generate().unwrap().sign(&json!({"role": "admin", "exp": exp}));
        let error = AdminKey::generate().unwrap().verify(&stranger, now().unwrap()).unwrap_err();
        assert!(error.to_string().contains("signature is not the admin's"));
    }

    #[test]
    fn the_pem_is_read_by_openssl() {
        let key = AdminKey::generate().unwrap();
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), key.pem()).unwrap();
        let out = std::process::Command::new("openssl")
            .args(["pkey", "-pubout", "-outform", "DER", "-in"])
            .arg(file.path())
            .output()
            .unwrap();
        assert!(
            out.stdout.ends_with(key.pair.public_key().as_ref()),
            "{}",
            String::from_utf8_lossy(&out.stderr)
        );
    }
}
