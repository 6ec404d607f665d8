//! What a container that means harm does over its control channel: what the program (`tests/src/bin/hostile.rs`) and the
//! scenario agree on.

/// In the container, once it has begun to misbehave.
pub const BEGUN: &str = "/tmp/begun";

/// When it begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// As the first generation of its service, once it serves.
    First,
    /// As a shadow, when it is sent the state.
    Shadow,
    /// As a shadow that has become owner and is verified.
    Verify,
}

impl Stage {
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::First => "first",
            Self::Shadow => "shadow",
            Self::Verify => "verify",
        }
    }

    #[must_use]
    pub fn of_name(name: &str) -> Option<Self> {
        [Self::First, Self::Shadow, Self::Verify].into_iter().find(|stage| stage.name() == name)
    }
}

macro_rules! misdeeds {
    ($($(#[doc = $doc:literal])+ $variant:ident = $name:literal,)+) => {
        /// What it does.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum Misdeed {
            $($(#[doc = $doc])+ $variant,)+
        }

        impl Misdeed {
            pub const ALL: &[Self] = &[$(Self::$variant,)+];

            #[must_use]
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)+ }
            }
        }
    };
}

misdeeds! {
    /// Packets of random bytes.
    Noise = "noise",
    /// Packets of no bytes.
    Empty = "empty",
    /// Messages that claim to hold more than they do, and packets longer than a message may be.
    Lengths = "lengths",
    /// The longest messages there are, for ever.
    Flood = "flood",
    /// Short messages of every kind, for ever.
    Chatter = "chatter",
    /// Greets again and again and reads none of the answers.
    Greetings = "greetings",
    /// Never reads again.
    Deaf = "deaf",
    /// 253 descriptors with a message that has none, for ever.
    Descriptors = "descriptors",
    /// 253 descriptors with a message that has as many, for ever.
    Strangers = "strangers",
    /// Fewer descriptors than the message has.
    Missing = "missing",
    /// A segment that can shrink.
    Unsealed = "unsealed",
    /// A segment that has shrunk.
    Shrunk = "shrunk",
    /// Segments with a forged magic, index, commit and length.
    Forged = "forged",
    /// Pipes, folders, devices and files as segments.
    Foreign = "foreign",
    /// Memory files of 8 EiB as segments.
    Huge = "huge",
    /// More segments than a service may have.
    Many = "many",
    /// A connection under the cookie of another socket.
    Cookie = "cookie",
    /// Its listener, and its own control channel, as connections.
    Listener = "listener",
    /// Answers to questions that nobody asked.
    Answers = "answers",
    /// A failure whose words are commands to a terminal, and very long.
    Words = "words",
    /// A greeting with more schemas than anybody has, and of another protocol.
    Schemas = "schemas",
    /// Closes its ends of the channel and lives on.
    Closed = "closed",
    /// Shuts down its ends of the channel and lives on.
    Shut = "shut",
    /// A child holds the channel and goes on where its parent stopped.
    Children = "children",
    /// Takes the other side's end of the channel, reads it and fills it.
    Rescue = "rescue",
    /// Writes to the pipe that says whether the supervisor lives.
    Lifeline = "lifeline",
    /// Makes its log as long as a file can be.
    Log = "log",
    /// Tries to write to the control page.
    Page = "page",
}

impl Misdeed {
    #[must_use]
    pub fn of_name(name: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|misdeed| misdeed.name() == name)
    }
}
