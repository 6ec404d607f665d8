//! The saved form of a forecaster, of an outlook, and of the base that outlooks begin with.
//!
//! ```text
//! 0   magic "WSWPFCST", "WSWPOUTL" or "WSWPBASE"  8 bytes
//! 8   version, u32 little endian      4
//! 12  length of the body, u64 LE      8
//! 20  body, postcard
//! ..  SHA-256 of all before           32
//! ```
//!
//! The digest finds damage, not forgery: whoever may write the state folder may also write a valid image.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use warmswap_model::ServiceName;

use crate::ForecastConfig;
use crate::lstm::ModelWeights;
use crate::profile::Profile;

const FORECASTER: &str = "WSWPFCST";
pub(crate) const OUTLOOK: &str = "WSWPOUTL";
pub(crate) const BASE: &str = "WSWPBASE";
const VERSION: u32 = 3;
const HEADER: usize = 20;
const DIGEST: usize = 32;
/// Larger than any image that is written: 100,000 profiles are below it.
const BODY_MAX: u64 = 1 << 30;

/// Why a saved forecaster, or weights, were refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ImportError {
    #[error("it is no forecast image: it does not begin with {magic:?}")]
    NotAnImage { magic: &'static str },
    #[error("it has version {found} and this warmswap knows {known}: it starts again from the baselines")]
    OtherVersion { found: u32, known: u32 },
    #[error("it is {have} bytes long and should be {need}: it was cut off or added to")]
    WrongLength { have: u64, need: u64 },
    #[error("its digest does not match: a byte has changed since it was written")]
    Damaged,
    #[error("it was made for {found} and this forecaster works with {wanted}")]
    OtherClock { found: String, wanted: String },
    #[error("its content cannot be used: {what}")]
    BadContent { what: String },
}

#[derive(Serialize)]
struct BodyRef<'a> {
    step_ms: u64,
    horizon_steps: u64,
    weights: Option<&'a ModelWeights>,
    services: &'a [(&'a ServiceName, &'a Profile)],
}

#[derive(Deserialize)]
struct Body {
    step_ms: u64,
    horizon_steps: u64,
    weights: Option<ModelWeights>,
    services: Vec<(ServiceName, Profile)>,
}

pub(crate) struct Content {
    pub(crate) weights: Option<ModelWeights>,
    pub(crate) services: Vec<(ServiceName, Profile)>,
}

pub(crate) fn write(
    config: &ForecastConfig,
    weights: Option<&ModelWeights>,
    services: &[(&ServiceName, &Profile)],
) -> Vec<u8> {
    seal(
        FORECASTER,
        &BodyRef { step_ms: config.step_ms, horizon_steps: config.horizon_steps as u64, weights, services },
    )
}

/// An image of this body.
pub(crate) fn seal(magic: &str, body: &impl Serialize) -> Vec<u8> {
    // Plain data in memory always encodes; an empty body would be refused when read.
    let body = postcard::to_stdvec(body).unwrap_or_default();
    let mut image = Vec::with_capacity(HEADER + body.len() + DIGEST);
    image.extend(magic.as_bytes());
    image.extend(VERSION.to_le_bytes());
    image.extend((body.len() as u64).to_le_bytes());
    image.extend(body);
    let digest = Sha256::digest(&image);
    image.extend(digest);
    image
}

/// The body of an image that is whole and of this version.
pub(crate) fn open<B: DeserializeOwned>(magic: &'static str, image: &[u8]) -> Result<B, ImportError> {
    let rest = image.strip_prefix(magic.as_bytes()).ok_or(ImportError::NotAnImage { magic })?;
    let have = image.len() as u64;
    let short = |need: usize| ImportError::WrongLength { have, need: need as u64 };
    let (version, rest) = rest.split_first_chunk::<4>().ok_or_else(|| short(HEADER + DIGEST))?;
    let version = u32::from_le_bytes(*version);
    if version != VERSION {
        return Err(ImportError::OtherVersion { found: version, known: VERSION });
    }
    let (length, _) = rest.split_first_chunk::<8>().ok_or_else(|| short(HEADER + DIGEST))?;
    let length = u64::from_le_bytes(*length).min(BODY_MAX);
    let need = length + (HEADER + DIGEST) as u64;
    if have != need {
        return Err(ImportError::WrongLength { have, need });
    }
    let (signed, digest) = image.split_at(image.len() - DIGEST);
    if Sha256::digest(signed).as_slice() != digest {
        return Err(ImportError::Damaged);
    }
    postcard::from_bytes(&signed[HEADER..]).map_err(|error| ImportError::BadContent { what: error.to_string() })
}

pub(crate) fn read(image: &[u8], config: &ForecastConfig) -> Result<Content, ImportError> {
    let body: Body = open(FORECASTER, image)?;
    let bad = |what: String| ImportError::BadContent { what };
    if (body.step_ms, body.horizon_steps) != (config.step_ms, config.horizon_steps as u64) {
        let clock = |step_ms: u64, steps: u64| format!("{steps} steps of {step_ms} ms");
        return Err(ImportError::OtherClock {
            found: clock(body.step_ms, body.horizon_steps),
            wanted: clock(config.step_ms, config.horizon_steps as u64),
        });
    }
    if let Some(weights) = &body.weights {
        weights.check().map_err(|what| bad(what.to_owned()))?;
    }
    if let Some((name, _)) = body.services.iter().find(|(_, profile)| !profile.is_sound()) {
        return Err(bad(format!("the record of service {name} contradicts itself")));
    }
    let mut names: Vec<&ServiceName> = body.services.iter().map(|(name, _)| name).collect();
    names.sort();
    if names.windows(2).any(|pair| pair[0] == pair[1]) {
        return Err(bad("a service is there twice".to_owned()));
    }
    Ok(Content { weights: body.weights, services: body.services })
}
